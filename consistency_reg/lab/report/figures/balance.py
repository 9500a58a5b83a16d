"""Draw consistency against global and against local balance."""

from consistency_reg.lab.render.charts import Chart, plane, points
from consistency_reg.lab.render.charts import Figure as Explored
from consistency_reg.lab.render.png import legend_below, panels
from consistency_reg.lab.report.findings import Findings
from consistency_reg.lab.report.looks import Looks
from consistency_reg.lab.report.measured import GLOBAL_CV, LOCAL_CV, SRP
from consistency_reg.lab.report.runs import Run
from consistency_reg.measures.reading import Reading
from consistency_reg.optional import require

with require("plots"):
    import pandas as pd
    from matplotlib.figure import Figure

TITLE = "SRP against balance"
CAPTION = (
    "SRP against balance, run by run. First, global: how unevenly the whole validation data uses the experts, which a "
    "consistent model need not do. Second, local: how unevenly a segment of 16 tokens uses them, which is "
    "what consistency is. A collapsed router goes right in both."
)
CONSISTENCY = "SRP, segments of 16 tokens (%)"
SIDES = (
    (GLOBAL_CV, "GLOBAL balance: over the whole validation"),
    (LOCAL_CV, "LOCAL balance: within segments of 16 tokens"),
)


def draw(findings: Findings, looks: Looks) -> Figure | None:
    """Draw two panels with one SRP axis; None where balance was not measured."""
    runs = _measured(findings)
    if not runs:
        return None
    figure, both = panels(1, 2, 11, 5.0, sharey=True)
    for axes, (measure, title) in zip(both, SIDES, strict=True):
        for run in runs:
            looks.point(axes, run, run.get(measure), 100 * run.get(SRP))
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
        axes.set_xlabel(_label(runs, measure))
        axes.margins(0.08, 0.1)
    both[1].set_facecolor("#F3F1EA")
    both[0].set_ylabel(CONSISTENCY)
    legend_below(figure, looks.legend(runs))
    return figure


def explore(findings: Findings, looks: Looks) -> Explored | None:
    """Return the same with every run to be pointed at and opened."""
    runs = _measured(findings)
    charts: list[Chart] = []
    for measure, title in SIDES if runs else ():
        marks = [looks.mark(run, run.get(measure), 100 * run.get(SRP)) for run in runs]
        charts.append(plane(points(marks), _label(runs, measure), CONSISTENCY, title=title))
    return Explored("balance", TITLE, CAPTION, charts) if charts else None


def _measured(findings: Findings) -> list[Run]:
    return [run for run in findings.runs if run.measured(GLOBAL_CV, LOCAL_CV, SRP)]


def _label(runs: list[Run], measure: Reading) -> str:
    """Return the title of the axis, with the rank correlation with SRP where there are runs enough for one."""
    ranks = pd.DataFrame([[run.get(measure), run.get(SRP)] for run in runs]).rank()
    correlation = ranks[0].corr(ranks[1])
    known = len(runs) > 2 and correlation == correlation
    said = f"\nSpearman's correlation with SRP: {correlation:+.2f}" if known else ""
    return f"CV of the experts' usage (0: all alike){said}"
