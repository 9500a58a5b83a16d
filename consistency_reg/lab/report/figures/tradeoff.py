"""Draw perplexity against LRU misses and against SRP, run by run."""

from collections.abc import Callable
from dataclasses import dataclass

from consistency_reg.lab.render.charts import Figure as Explored
from consistency_reg.lab.render.charts import plane, points, spans
from consistency_reg.lab.render.png import legend_below, panels
from consistency_reg.lab.report.findings import Findings
from consistency_reg.lab.report.looks import Looks
from consistency_reg.lab.report.measured import HITS, PERPLEXITY, SRP
from consistency_reg.lab.report.pairs import Pair
from consistency_reg.lab.report.runs import Run
from consistency_reg.measures.reading import Reading
from consistency_reg.optional import require

with require("plots"):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

TITLE = "Trade-off, run by run"
CAPTION = (
    "Every run: perplexity against LRU misses and against SRP. A line leads from each baseline to the run of the same "
    "seed with the term."
)
QUALITY = "validation perplexity, all domains\n← better"
MANY = 12  # pairs, beyond which arrows stand back


@dataclass(frozen=True)
class Side:
    """Holds one of the two panels: the measure that it needs, how it is read, and the title of its axis."""

    needed: Reading
    read: Callable[[Run], float]
    label: str


SIDES = (
    Side(
        HITS,
        lambda run: 100 * run.misses,
        "LRU misses at cache = 25% of the experts (% of expert accesses)\n← better",
    ),
    Side(SRP, lambda run: 100 * run.get(SRP), "SRP, segments of 16 tokens (%)\nbetter →"),
)


def draw(findings: Findings, looks: Looks) -> Figure:
    """Draw a point for each run, an arrow for each pair; runs that lack a panel's metric are not in it."""
    figure, both = panels(1, 2, 11, 5.4, sharey=True)
    for axes, side in zip(both, SIDES, strict=True):
        for pair in _pairs(findings, side):
            _arrow(axes, pair, side.read, looks.colour(pair.run), alpha=0.7 if len(findings.pairs) <= MANY else 0.3)
        for run in findings.runs:
            if run.measured(side.needed):
                looks.point(axes, run, side.read(run), run.get(PERPLEXITY))
        axes.margins(0.1, 0.1)
        axes.set_xlabel(side.label)
    both[0].set_ylabel(QUALITY)
    handles = looks.legend(findings.runs)
    if findings.pairs:
        arrow = Line2D([0, 1], [0, 0], color="0.35", marker=">", markevery=[1], label="baseline to its pair")
        handles.append(arrow)
    legend_below(figure, handles)
    return figure


def explore(findings: Findings, looks: Looks) -> Explored | None:
    """Return a chart for each side that any run has measured, whose points open their runs; None without one."""
    charts = []
    for side in SIDES:
        measured = [run for run in findings.runs if run.measured(side.needed)]
        marks = [looks.mark(run, side.read(run), run.get(PERPLEXITY)) for run in measured]
        arrows = [
            looks.mark(
                pair.run,
                side.read(pair.baseline),
                pair.baseline.get(PERPLEXITY),
                x2=side.read(pair.run),
                y2=pair.run.get(PERPLEXITY),
                alpha=0.4,
            )
            for pair in _pairs(findings, side)
        ]
        if marks:
            charts.append(plane([*spans(arrows), *points(marks)], side.label, QUALITY))
    return Explored("tradeoff", TITLE, CAPTION, charts) if charts else None


def _pairs(findings: Findings, side: Side) -> list[Pair]:
    """Return the pairs of which both runs have what a panel shows."""
    return [pair for pair in findings.pairs if pair.run.measured(side.needed) and pair.baseline.measured(side.needed)]


def _arrow(axes: Axes, pair: Pair, read: Callable[[Run], float], colour: str, alpha: float) -> None:
    axes.annotate(
        "",
        xy=(read(pair.run), pair.run.get(PERPLEXITY)),
        xytext=(read(pair.baseline), pair.baseline.get(PERPLEXITY)),
        arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 1.2, "shrinkA": 7, "shrinkB": 7, "alpha": alpha},
    )
