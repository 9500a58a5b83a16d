"""Perplexity against LRU misses and against SRP, run by run."""

from collections.abc import Callable

from consistency_reg.lab.render.png import legend_below, panels
from consistency_reg.lab.report.findings import Findings
from consistency_reg.lab.report.looks import Looks
from consistency_reg.lab.report.measured import HITS, PERPLEXITY, SRP
from consistency_reg.lab.report.pairs import Pair
from consistency_reg.lab.report.runs import Run
from consistency_reg.optional import require
from consistency_reg.reading import Reading

with require("plots"):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

CAPTION = (
    "Every run: perplexity against LRU misses and against SRP. An arrow leads from each baseline to the run of the "
    "same seed with the term."
)

MANY = 12  # pairs, beyond which arrows stand back


def draw(findings: Findings, looks: Looks) -> Figure:
    """A point for each run, an arrow for each pair; runs that lack a panel's metric are not in it."""
    figure, (left, right) = panels(1, 2, 11, 5.4, sharey=True)
    sides: tuple[tuple[Axes, Reading, Callable[[Run], float]], ...] = (
        (left, HITS, lambda run: 100 * run.misses),
        (right, SRP, lambda run: 100 * run.get(SRP)),
    )
    for axes, needed, read in sides:
        for pair in findings.pairs:
            if pair.run.measured(needed) and pair.baseline.measured(needed):
                _arrow(axes, pair, read, looks.colour(pair.run), alpha=0.7 if len(findings.pairs) <= MANY else 0.3)
        for run in findings.runs:
            if run.measured(needed):
                looks.point(axes, run, read(run), run.get(PERPLEXITY))
        axes.margins(0.1, 0.1)
    left.set_xlabel("LRU misses at cache = 25% of the experts (% of expert accesses)\n← better")
    right.set_xlabel("SRP, segments of 16 tokens (%)\nbetter →")
    left.set_ylabel("validation perplexity, all domains\n← better")
    handles = looks.legend(findings.runs)
    if findings.pairs:
        arrow = Line2D([0, 1], [0, 0], color="0.35", marker=">", markevery=[1], label="baseline to its pair")
        handles.append(arrow)
    legend_below(figure, handles)
    return figure


def _arrow(axes: Axes, pair: Pair, read: Callable[[Run], float], colour: str, alpha: float) -> None:
    axes.annotate(
        "",
        xy=(read(pair.run), pair.run.get(PERPLEXITY)),
        xytext=(read(pair.baseline), pair.baseline.get(PERPLEXITY)),
        arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 1.2, "shrinkA": 7, "shrinkB": 7, "alpha": alpha},
    )
