"""Draw the frontier: what each cell gains and costs against its baseline, with its seeds as intervals."""

from dataclasses import dataclass
from typing import Any

from consistency_reg.lab.render.charts import Area, Mark, lines, plane, points, spans, texts
from consistency_reg.lab.render.charts import Figure as Explored
from consistency_reg.lab.render.page import CELL
from consistency_reg.lab.render.png import entry, legend_below, panels
from consistency_reg.lab.report.findings import Findings
from consistency_reg.lab.report.gate import GATE
from consistency_reg.lab.report.looks import Looks, cross, errors, whisker_marks
from consistency_reg.lab.report.runs import Run
from consistency_reg.optional import require

with require("plots"):
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

TITLE = "Frontier: saved and paid"
CAPTION = (
    "Changes against the baseline of the same seed: a point for each cell's mean over its seeds, whiskers from the "
    "lowest to the highest seed, next to it the term's weight. A line joins the weights of a loss. Pale: another cell "
    "is as good in both and better in one. Over a cross: cells of which a run collapsed or gave up global balance; "
    "they dominate nothing. Shaded: the misses and the perplexity that the gate asks for."
)
COST = "perplexity, change against the baseline (%)\n← better"


@dataclass(frozen=True)
class Side:
    """Holds one of the two panels: what is gained, which way is better, and the title of its axis."""

    gain: str
    towards: int
    label: str


SIDES = (
    Side("misses_change", -1, "LRU misses at cache = 25% of the experts,\nchange against the baseline (%)   ← better"),
    Side(
        "srp_change",
        1,
        "SRP, segments of 16 tokens,\nchange against the baseline (percentage points)   better →",
    ),
)


def draw(findings: Findings, looks: Looks) -> Figure | None:
    """Draw perplexity against LRU misses and against SRP; None without pairs."""
    if not findings.pairs:
        return None
    runs = findings.run_of_cell
    figure, both = panels(1, 2, 11, 5.4, sharey=True)
    for axes, side in zip(both, SIDES, strict=True):
        measured, undominated = _measured(findings, side)
        _lines(axes, measured, side.gain, looks, runs)
        for (_, cell), free in zip(measured.iterrows(), undominated, strict=True):
            run = runs[cell["cell"]]
            _whiskers(axes, cell, side.gain, looks.colour(run), looks.shape(run), alpha=1 if free else 0.35)
            if free or len(measured) <= 8:
                _weight(axes, cell, side.gain)
        axes.plot(0, 0, "o", color="0.35", markerfacecolor="white", markersize=8, markeredgewidth=1.6, zorder=3)
        axes.axhline(0, color="0.6", linewidth=0.8)
        axes.axvline(0, color="0.6", linewidth=0.8)
        axes.margins(0.1, 0.14)
        axes.set_xlabel(side.label)
    _shade_the_gate(both[0])
    both[0].set_ylabel(COST)
    handles = looks.legend(findings.runs, collapsed=False)
    handles.append(entry("dominated", "o", color="0.35", alpha=0.35))
    if findings.cells["left_out"].any():
        handles.append(entry("left out", "x", color="black", markersize=10))
    legend_below(figure, handles)
    return figure


def explore(findings: Findings, looks: Looks) -> Explored | None:
    """Return the same with every cell to be pointed at and opened; None without pairs."""
    if not findings.pairs:
        return None
    runs = findings.run_of_cell
    charts = []
    for place, side in enumerate(SIDES):
        measured, undominated = _measured(findings, side)
        marks = [
            _mark(cell, side.gain, looks, runs[cell["cell"]], free)
            for (_, cell), free in zip(measured.iterrows(), undominated, strict=True)
        ]
        kept = [mark.but(alpha=0.5) for mark in marks if not mark.crossed]
        seeds = whisker_marks(measured, side.gain, marks)
        baseline = Mark(0.0, 0.0, group="none", colour="var(--none)", hollow=True, say="the baseline of each cell")
        named = [mark for mark, free in zip(marks, undominated, strict=True) if free or len(marks) <= 8]
        area = Area(100 * GATE[0].bound, 100 * GATE[1].bound, "gate") if place == 0 else None
        layers = [*lines(kept), *spans(seeds), *points([*marks, baseline]), *texts(named)]
        charts.append(plane(layers, side.label, COST, zeros=True, area=area))
    return Explored("frontier", TITLE, CAPTION, charts)


def _measured(findings: Findings, side: Side) -> tuple[pd.DataFrame, list[bool]]:
    """Return the cells that have the gain, and of each whether no other one dominates it."""
    cells = findings.cells
    measured = cells[cells[f"{side.gain}_mean"].notna()]
    return measured, _undominated(measured, side.gain, side.towards)


def _undominated(cells: pd.DataFrame, gain: str, towards: int) -> list[bool]:
    """Return whether no cell that stays, of the same baseline, is as good in both and better in one."""
    kept = cells[cells["left_out"] == 0]
    free = []
    for _, cell in cells.iterrows():
        rivals = kept[kept["against"] == cell["against"]]
        gained = towards * (rivals[f"{gain}_mean"] - cell[f"{gain}_mean"])
        saved = cell["perplexity_change_mean"] - rivals["perplexity_change_mean"]
        dominated = (gained >= 0) & (saved >= 0) & ((gained > 0) | (saved > 0))
        free.append(not (dominated.any() or cell["left_out"]))
    return free


def _mark(cell: pd.Series, gain: str, looks: Looks, run: Run, free: bool) -> Mark:
    return looks.mark(
        run,
        100 * cell[f"{gain}_mean"],
        100 * cell["perplexity_change_mean"],
        id=f"{CELL}{cell['cell']}",
        crossed=bool(cell["left_out"]),
        alpha=1.0 if free or cell["left_out"] else 0.45,
        line=f"{cell['against']} {cell['loss']}",
        order=float(cell["weight"]),
        text=f"{cell['weight']:g}",
    )


def _lines(axes: Axes, cells: pd.DataFrame, gain: str, looks: Looks, runs: dict) -> None:
    for _, group in cells.groupby(["against", "loss"], sort=False):
        ordered = group[group["left_out"] == 0].sort_values("weight")
        colour = looks.colour(runs[group["cell"].iloc[0]])
        xs, ys = 100 * ordered[f"{gain}_mean"], 100 * ordered["perplexity_change_mean"]
        axes.plot(xs, ys, color=colour, linewidth=1, alpha=0.6)


def _whiskers(axes: Axes, cell: pd.Series, gain: str, colour: str, shape: str, alpha: float) -> None:
    x, y = (100 * cell[f"{name}_mean"] for name in (gain, "perplexity_change"))
    if cell["left_out"]:
        cross(axes, x, y)
    style: dict[str, Any] = {"elinewidth": 1, "capsize": 2.5, "markersize": 7, "alpha": alpha, "zorder": 3}
    axes.errorbar(x, y, **errors(cell, gain), fmt=shape, color=colour, **style)


def _weight(axes: Axes, cell: pd.Series, gain: str) -> None:
    place = (100 * cell[f"{gain}_mean"], 100 * cell["perplexity_change_mean"])
    axes.annotate(f"{cell['weight']:g}", place, (5, 5), textcoords="offset points", fontsize=8, color="0.25", zorder=5)


def _shade_the_gate(axes: Axes) -> None:
    """Tint where a cell's mean passes the gate's misses and perplexity; limits stay as the points set them."""
    misses, perplexity = 100 * GATE[0].bound, 100 * GATE[1].bound
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    left, low, high = min(left, misses - 5), min(low, -0.1), max(high, perplexity * 1.5)
    axes.add_patch(Rectangle((left, low), misses - left, perplexity - low, color="#009E73", alpha=0.1, linewidth=0))
    axes.text(misses, low, "gate ", ha="right", va="bottom", fontsize=9, color="#00694D")
    axes.set_xlim(left, right)
    axes.set_ylim(low, high)
