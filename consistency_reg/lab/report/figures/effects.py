"""The effect of each design choice at equal budget."""

from typing import Any

from consistency_reg.lab.render.palette import COLOURS, NO_TERM
from consistency_reg.lab.render.png import panels, whiskers
from consistency_reg.lab.report.findings import Findings
from consistency_reg.lab.report.looks import Looks
from consistency_reg.optional import require

with require("plots"):
    from matplotlib.figure import Figure

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
    """A row for each choice, a panel for each of what it changes; None where no two runs differ in one choice."""
    effects = findings.effects
    if effects.empty:
        return None
    names = [
        f"{row['choice']}={row['value']}, not {row['reference']}" + (f"\n({row['among']})" if row["among"] else "")
        for _, row in effects.iterrows()
    ]
    sides = [side for side in SIDES if effects[f"{side[0]}_mean"].notna().any()]
    figure, every = panels(1, len(sides), 12, 1.4 + 0.42 * len(names), sharey=True)
    for axes, (name, scale, label) in zip(every, sides, strict=True):
        for place, (_, row) in enumerate(effects.iterrows()):
            mean, low, high = (round(scale * row[f"{name}_{over}"], 6) for over in ("mean", "min", "max"))
            agreed = low > 0 or high < 0
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
