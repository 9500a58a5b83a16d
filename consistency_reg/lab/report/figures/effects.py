"""Draw the effect of each design choice at equal budget."""

from typing import Any

from consistency_reg.lab.render.charts import Figure as Explored
from consistency_reg.lab.render.charts import Mark, points, rows, spans
from consistency_reg.lab.render.palette import COLOURS, NO_TERM, css_name
from consistency_reg.lab.render.png import panels, whiskers
from consistency_reg.lab.report.findings import Findings
from consistency_reg.lab.report.looks import Looks
from consistency_reg.lab.report.pairs import mean_and_range
from consistency_reg.optional import require

with require("plots"):
    import pandas as pd
    from matplotlib.figure import Figure

TITLE = "Effects of design choices"
CAPTION = (
    "The effect of each design choice: differences to the run that differs in this choice alone, of the same seed and "
    "as many tokens; means over the seeds, whiskers from the lowest to the highest. Grey where the seeds do not agree "
    "on the sign."
)
SIDES = (
    ("misses", 100, "LRU misses at cache = 25%\n(change in %)   ← better"),
    ("perplexity", 100, "perplexity\n(change in %)   ← better"),
    ("srp", 100, "SRP, segments of 16 tokens\n(percentage points)   better →"),
    ("sd", 1, "balance: SD of the usage\n(percentage points)   ← more even"),
)


def draw(findings: Findings, looks: Looks) -> Figure | None:
    """Draw a row for each choice, a panel for each of what it changes; None where no two runs differ in one choice."""
    effects, sides = findings.effects, _sides(findings)
    if not sides:
        return None
    names = [_name(row, "\n") for _, row in effects.iterrows()]
    figure, every = panels(1, len(sides), 12, 1.4 + 0.42 * len(names), sharey=True)
    for axes, (name, scale, label) in zip(every, sides, strict=True):
        for place, (_, row) in enumerate(effects.iterrows()):
            mean, low, high, agreed = _effect(row, name, scale)
            style: dict[str, Any] = {
                "color": COLOURS[0] if agreed else NO_TERM,
                "capsize": 2.5,
                "markersize": 6,
                "elinewidth": 1.2,
            }
            axes.errorbar(mean, place, xerr=whiskers(mean, low, high), fmt="o" if agreed else "s", **style)
        axes.axvline(0, color="0.4", linewidth=0.9)
        axes.update_datalim([(-0.05, 0), (0.05, 0)])  # a panel without any effect has a scale too
        axes.set_xlabel(label, fontsize=9)
        axes.tick_params(axis="x", labelsize=8)
        axes.margins(0.12, 0)
    every[0].set_yticks(range(len(names)), names, fontsize=8, parse_math=False)
    every[0].set_ylim(len(names) - 0.5, -0.5)
    return figure


def explore(findings: Findings, looks: Looks) -> Explored | None:
    """Return the same to be pointed at and filtered; None where no two runs differ in one choice."""
    charts = []
    names = [_name(row, "\n") for _, row in findings.effects.iterrows()]
    for name, scale, label in _sides(findings):
        marks = []
        for choice, (_, row) in zip(names, findings.effects.iterrows(), strict=True):
            mean, low, high, agreed = _effect(row, name, scale)
            told = choice.replace("\n", " ")
            say = f"{told}: {mean:+.1f} ({low:+.1f} to {high:+.1f}), {row['seeds']} seeds"
            look = ("o", css_name(COLOURS[0])) if agreed else ("s", css_name(NO_TERM))
            marks.append((Mark(mean, choice, cell=choice, say=say, shape=look[0], colour=look[1]), low, high))
        whiskers_of_all = [mark.but(x=low, x2=high) for mark, low, high in marks]
        charts.append(rows([*spans(whiskers_of_all), *points([mark for mark, *_ in marks])], names, label))
    return Explored("effects", TITLE, CAPTION, charts) if charts else None


def _sides(findings: Findings) -> list[tuple[str, float, str]]:
    """Return what the choices are known to change."""
    effects = findings.effects
    return [] if effects.empty else [side for side in SIDES if effects[f"{side[0]}_mean"].notna().any()]


def _name(row: pd.Series, between: str) -> str:
    among = f"{between}({row['among']})" if row["among"] else ""
    return f"{row['choice']}={row['value']}, not {row['reference']}{among}"


def _effect(row: pd.Series, name: str, scale: float) -> tuple[float, float, float, bool]:
    """Return the mean, the lowest and the highest effect, and whether all have one sign."""
    mean, low, high = (round(scale * value, 6) for value in mean_and_range(row, name))
    return mean, low, high, low > 0 or high < 0
