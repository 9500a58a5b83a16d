"""Consistency against global and against local balance: which of the two it has to give up."""

from consistency_reg.lab.render.png import legend_below, panels
from consistency_reg.lab.report.findings import Findings
from consistency_reg.lab.report.looks import Looks
from consistency_reg.lab.report.measured import GLOBAL_CV, LOCAL_CV, SRP
from consistency_reg.lab.report.runs import Run
from consistency_reg.optional import require
from consistency_reg.reading import Reading

with require("plots"):
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CAPTION = (
    "SRP against balance, run by run. Left, global: how unevenly the whole validation data uses the experts, which a "
    "consistent model need not do. Right (tinted), local: how unevenly a segment of 16 tokens uses them, which is "
    "what consistency is. A collapsed router goes right in both panels."
)


def draw(findings: Findings, looks: Looks) -> Figure | None:
    """Two panels with one SRP axis; None where balance was not measured."""
    runs = [run for run in findings.runs if run.measured(GLOBAL_CV, LOCAL_CV, SRP)]
    if not runs:
        return None
    figure, (left, right) = panels(1, 2, 11, 5.0, sharey=True)
    _panel(left, runs, looks, GLOBAL_CV, "GLOBAL balance: over the whole validation")
    _panel(right, runs, looks, LOCAL_CV, "LOCAL balance: within segments of 16 tokens")
    right.set_facecolor("#F3F1EA")
    left.set_ylabel("SRP, segments of 16 tokens (%)")
    legend_below(figure, looks.legend(runs))
    return figure


def _panel(axes: Axes, runs: list[Run], looks: Looks, measure: Reading, title: str) -> None:
    for run in runs:
        looks.point(axes, run, run.get(measure), 100 * run.get(SRP))
    ranks = pd.DataFrame([[run.get(measure), run.get(SRP)] for run in runs]).rank()
    correlation = ranks[0].corr(ranks[1])
    known = len(runs) > 2 and correlation == correlation
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel(
        "CV of the experts' usage (0: all alike)"
        + (f"\nSpearman's correlation with SRP: {correlation:+.2f}" if known else "")
    )
    axes.margins(0.08, 0.1)
