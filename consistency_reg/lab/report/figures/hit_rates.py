"""Draw LRU hit rates by cache size, with the knee of each curve."""

from collections.abc import Sequence
from typing import Any

from consistency_reg.lab.knee import knee
from consistency_reg.lab.recipe import routed_experts
from consistency_reg.lab.render.charts import Figure as Explored
from consistency_reg.lab.render.charts import Mark, lines, plane, points
from consistency_reg.lab.render.page import CELL
from consistency_reg.lab.render.png import entry, legend_below, panels, whiskers
from consistency_reg.lab.report.findings import Findings
from consistency_reg.lab.report.looks import Looks
from consistency_reg.lab.report.runs import Run
from consistency_reg.measures import HIT_RATE
from consistency_reg.measures.reading import VALIDATION
from consistency_reg.optional import require

with require("plots"):
    import pandas as pd
    from matplotlib.figure import Figure

TITLE = "Hit rate by cache size"
CAPTION = (
    "LRU hit rate by cache ratio (slots of a layer over the experts active per token), means over the seeds. A large "
    "diamond marks the knee of a curve of at least four sizes, beyond which slots bring less than they do on average. "
    "Curves have the sizes that the recipe's monitor.cache_ratios and monitor.cache_shares ask for."
)
SIZES, RATE = "cache ratio rho: slots of a layer / active experts per token", "LRU hit rate (%)"
LEAST_SIZES = 4  # of a curve whose knee is worth naming


def draw(findings: Findings, looks: Looks) -> Figure | None:
    """Draw a curve for the best cell of each loss, bars from the lowest to the highest seed.

    Returns:
        None where no run has two cache sizes.
    """
    shown = {cell: seeds for cell, seeds in curves(findings.runs).items() if cell in findings.shown}
    if not shown:
        return None
    figure, (axes,) = panels(1, 1, 9, 5.2)
    handles = []
    some_knee = False
    for cell, seeds in shown.items():
        run = findings.run_of_cell[cell]
        style: dict[str, Any] = {"color": looks.colour(run), "marker": looks.shape(run), "linestyle": _dashes(run)}
        face = "white" if run.loss == "none" else style["color"]
        errors = whiskers(seeds["mean"], seeds["min"], seeds["max"])
        axes.errorbar(seeds.index, seeds["mean"], yerr=errors, capsize=2.5, markersize=6, markerfacecolor=face, **style)
        handles.append(axes.plot([], [], markerfacecolor=face, label=cell, **style)[0])
        if (bend := _knee(seeds)) is not None:
            some_knee = True
            axes.plot(*bend, "D", color="black", markersize=12, markerfacecolor="none", markeredgewidth=1.6, zorder=5)
    axes.set(xlabel=SIZES, ylabel=RATE)
    if some_knee:
        handles.append(entry("knee", "D", color="black", markerfacecolor="none", markersize=10, markeredgewidth=1.6))
    legend_below(figure, handles, columns=3)
    return figure


def explore(findings: Findings, looks: Looks) -> Explored | None:
    """Return the curves of all cells to be pointed at and opened; None where no run has two cache sizes."""
    marks: list[Mark] = []
    knees: list[Mark] = []
    for cell, seeds in curves(findings.runs).items():
        for ratio, (mean, low, high) in zip(seeds.index, seeds.to_numpy(), strict=True):
            over = f" ({low:.1f} to {high:.1f}%)" if low < high else ""
            say = f"{ratio:.3g} x K slots: {mean:.1f}% hits{over}"
            look = {"id": f"{CELL}{cell}", "line": cell, "order": ratio, "say": say, "crossed": False}
            marks.append(looks.mark(findings.run_of_cell[cell], ratio, mean, **look))
        if (bend := _knee(seeds)) is not None:
            knees.append(marks[-1].but(x=bend[0], y=bend[1], shape="D", hollow=True))
    layers = [*lines(marks), *points(knees, size=260), *points(marks, size=30)]
    return Explored("hit_rates", TITLE, CAPTION, [plane(layers, SIZES, RATE)]) if marks else None


def curves(runs: Sequence[Run]) -> dict[str, pd.DataFrame]:
    """Return by cell the mean, lowest and highest hit rate in percent, by cache ratio; {} where there is one size."""
    rates = [(run.cell, ratio, 100 * rate) for run in runs for ratio, rate in curve(run).items()]
    frame = pd.DataFrame(rates, columns=["cell", "ratio", "hits"])
    if frame["ratio"].nunique() < 2:
        return {}
    groups = frame.groupby("cell", sort=False)
    return {str(cell): group.groupby("ratio")["hits"].agg(["mean", "min", "max"]) for cell, group in groups}


def _knee(seeds: pd.DataFrame) -> tuple[float, float] | None:
    """Return the cache ratio and hit rate at the knee of a curve that has sizes enough for one."""
    bend = knee(seeds.index.tolist(), seeds["mean"].tolist()) if len(seeds) >= LEAST_SIZES else None
    return None if bend is None else (seeds.index[bend], seeds["mean"].iloc[bend])


def curve(run: Run) -> dict[float, float]:
    """Return the LRU hit rate by cache ratio; shares of the experts become ratios where E and K are known."""
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
