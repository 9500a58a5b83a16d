"""The frontier: what each cell gains and costs against its baseline, with its seeds as intervals."""

from typing import Any

from consistency_reg.lab.render.png import entry, legend_below, panels, whiskers
from consistency_reg.lab.report.findings import Findings
from consistency_reg.lab.report.gate import GATE
from consistency_reg.lab.report.looks import Looks
from consistency_reg.optional import require

with require("plots"):
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

CAPTION = (
    "The frontier: changes against the baseline of the same seed, a point for each cell's mean over its seeds, "
    "whiskers from the lowest to the highest seed, beside it the term's weight. A line joins the weights of a loss. "
    "Pale: another cell is as good in both and better in one. Crossed out: cells of which a run collapsed or gave up "
    "global balance; they dominate nothing. Shaded: the misses and the perplexity that the gate asks for."
)


def draw(findings: Findings, looks: Looks) -> Figure | None:
    """Perplexity against LRU misses and against SRP; None without pairs."""
    if not findings.pairs:
        return None
    cells = findings.cells
    runs = {run.cell: run for run in findings.runs}
    figure, (left, right) = panels(1, 2, 11, 5.4, sharey=True)
    for axes, gain, towards in ((left, "misses_change", -1), (right, "srp_change", 1)):
        measured = cells[cells[f"{gain}_mean"].notna()]
        undominated = _undominated(measured, gain, towards)
        _lines(axes, measured, gain, looks, runs)
        for (_, cell), free in zip(measured.iterrows(), undominated, strict=True):
            run = runs[cell["cell"]]
            _whiskers(axes, cell, gain, looks.colour(run), looks.shape(run), alpha=1 if free else 0.35)
            if free or len(measured) <= 8:
                _weight(axes, cell, gain)
        axes.plot(0, 0, "o", color="0.35", markerfacecolor="white", markersize=8, markeredgewidth=1.6, zorder=3)
        axes.axhline(0, color="0.6", linewidth=0.8)
        axes.axvline(0, color="0.6", linewidth=0.8)
        axes.margins(0.1, 0.14)
    _shade_the_gate(left)
    left.set_xlabel("LRU misses at cache = 25% of the experts,\nchange against the baseline (%)   ← better")
    right.set_xlabel("SRP, segments of 16 tokens,\nchange against the baseline (percentage points)   better →")
    left.set_ylabel("perplexity, change against the baseline (%)\n← better")
    handles = looks.legend(findings.runs, collapsed=False)
    handles.append(entry("dominated", "o", color="0.35", alpha=0.35))
    if cells["left_out"].any():
        handles.append(entry("left out", "x", color="black", markersize=10))
    legend_below(figure, handles)
    return figure


def _undominated(cells: pd.DataFrame, gain: str, towards: int) -> list[bool]:
    """Whether no cell that stays, of the same baseline, is as good in both and better in one."""
    kept = cells[cells["left_out"] == 0]
    free = []
    for _, cell in cells.iterrows():
        rivals = kept[kept["against"] == cell["against"]]
        gained = towards * (rivals[f"{gain}_mean"] - cell[f"{gain}_mean"])
        saved = cell["perplexity_change_mean"] - rivals["perplexity_change_mean"]
        dominated = (gained >= 0) & (saved >= 0) & ((gained > 0) | (saved > 0))
        free.append(not (dominated.any() or cell["left_out"]))
    return free


def _lines(axes: Axes, cells: pd.DataFrame, gain: str, looks: Looks, runs: dict) -> None:
    for _, group in cells.groupby(["against", "loss"], sort=False):
        ordered = group[group["left_out"] == 0].sort_values("weight")
        colour = looks.colour(runs[group["cell"].iloc[0]])
        xs, ys = 100 * ordered[f"{gain}_mean"], 100 * ordered["perplexity_change_mean"]
        axes.plot(xs, ys, color=colour, linewidth=1, alpha=0.6)


def _whiskers(axes: Axes, cell: pd.Series, gain: str, colour: str, shape: str, alpha: float) -> None:
    x, y = (100 * cell[f"{name}_mean"] for name in (gain, "perplexity_change"))
    xerr, yerr = (
        100 * whiskers(*(cell[f"{name}_{over}"] for over in ("mean", "min", "max")))
        for name in (gain, "perplexity_change")
    )
    style: dict[str, Any] = {"elinewidth": 1, "capsize": 2.5, "markersize": 7, "alpha": alpha, "zorder": 3}
    axes.errorbar(x, y, xerr=xerr, yerr=yerr, fmt=shape, color=colour, **style)
    if cell["left_out"]:
        axes.plot(x, y, "x", color="black", markersize=13, markeredgewidth=1.4, zorder=4)


def _weight(axes: Axes, cell: pd.Series, gain: str) -> None:
    place = (100 * cell[f"{gain}_mean"], 100 * cell["perplexity_change_mean"])
    axes.annotate(f"{cell['weight']:g}", place, (5, 5), textcoords="offset points", fontsize=8, color="0.25", zorder=5)


def _shade_the_gate(axes: Axes) -> None:
    """Where a cell's mean passes the gate's misses and perplexity; limits stay as the points set them."""
    misses, perplexity = 100 * GATE[0].bound, 100 * GATE[1].bound
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    left, low, high = min(left, misses - 5), min(low, -0.1), max(high, perplexity * 1.5)
    axes.add_patch(Rectangle((left, low), misses - left, perplexity - low, color="#009E73", alpha=0.1, linewidth=0))
    axes.text(misses, low, "gate ", ha="right", va="bottom", fontsize=9, color="#00694D")
    axes.set_xlim(left, right)
    axes.set_ylim(low, high)
