"""LRU hit rate by cache size, with the knee of each curve."""

from typing import Any

from consistency_reg.lab.knee import knee
from consistency_reg.lab.recipe import routed_experts
from consistency_reg.lab.render.png import entry, legend_below, panels, whiskers
from consistency_reg.lab.report.findings import Findings
from consistency_reg.lab.report.looks import Looks
from consistency_reg.lab.report.runs import Run
from consistency_reg.measures import HIT_RATE
from consistency_reg.optional import require
from consistency_reg.reading import VALIDATION

with require("plots"):
    import pandas as pd
    from matplotlib.figure import Figure

CAPTION = (
    "LRU hit rate by cache ratio (slots of a layer over the experts active per token), means over the seeds, bars "
    "from the lowest to the highest; the best cell of each loss. A diamond marks the knee of a curve of at least four "
    "sizes, beyond which slots bring less than they do on average. Curves have the sizes that the recipe's "
    "monitor.cache_ratios and monitor.cache_shares ask for."
)
LEAST_SIZES = 4  # of a curve whose knee is worth naming


def draw(findings: Findings, looks: Looks) -> Figure | None:
    """A curve for each shown cell; None where no run has two cache sizes."""
    runs = [run for run in findings.runs if run.cell in findings.shown]
    rates = [(run.cell, ratio, 100 * rate) for run in runs for ratio, rate in curve(run).items()]
    frame = pd.DataFrame(rates, columns=["cell", "ratio", "hits"])
    if frame["ratio"].nunique() < 2:
        return None
    by_cell = {run.cell: run for run in runs}
    figure, (axes,) = panels(1, 1, 9, 5.2)
    handles = []
    some_knee = False
    for cell, group in frame.groupby("cell", sort=False):
        run = by_cell[cell]
        seeds = group.groupby("ratio")["hits"].agg(["mean", "min", "max"])
        style: dict[str, Any] = {"color": looks.colour(run), "marker": looks.shape(run), "linestyle": _dashes(run)}
        face = "white" if run.loss == "none" else style["color"]
        errors = whiskers(seeds["mean"], seeds["min"], seeds["max"])
        axes.errorbar(seeds.index, seeds["mean"], yerr=errors, capsize=2.5, markersize=6, markerfacecolor=face, **style)
        handles.append(axes.plot([], [], markerfacecolor=face, label=cell, **style)[0])
        bend = knee(seeds.index.tolist(), seeds["mean"].tolist()) if len(seeds) >= LEAST_SIZES else None
        if bend is not None:
            some_knee = True
            place = (seeds.index[bend], seeds["mean"].iloc[bend])
            axes.plot(*place, "D", color="black", markersize=12, markerfacecolor="none", markeredgewidth=1.6, zorder=5)
    axes.set(xlabel="cache ratio rho: slots of a layer / active experts per token", ylabel="LRU hit rate (%)")
    if some_knee:
        handles.append(entry("knee", "D", color="black", markerfacecolor="none", markersize=10, markeredgewidth=1.6))
    legend_below(figure, handles, columns=3)
    return figure


def curve(run: Run) -> dict[float, float]:
    """LRU hit rate by cache ratio, smallest first; shares of the experts become ratios where E and K are known."""
    sizes = routed_experts(run.architecture)
    rates = {}
    for reading, rate in run.readings():
        of_model = reading.layer is None and not reading.domain and reading.stage == VALIDATION
        if reading.measure is not HIT_RATE or reading.cache != "lru" or not of_model:
            continue
        if reading.ratio is not None:
            rates[reading.ratio] = rate
        elif sizes and reading.share is not None:
            rates[max(round(reading.share * sizes[0]), 1) / sizes[1]] = rate
    return dict(sorted(rates.items()))


def _dashes(run: Run) -> str:
    return "--" if run.loss == "none" else "-"
