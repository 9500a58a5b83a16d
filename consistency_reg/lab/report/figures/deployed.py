"""Draw the frontier of deployed models: a line for each cell through the strengths of cache-aware routing."""

from collections import Counter
from typing import Any

from consistency_reg.lab.render.charts import Figure as Explored
from consistency_reg.lab.render.charts import Mark, lines, plane, points, spans, texts
from consistency_reg.lab.render.page import CELL
from consistency_reg.lab.render.png import entry, legend_below, panels
from consistency_reg.lab.render.table import change, number
from consistency_reg.lab.report.findings import Findings
from consistency_reg.lab.report.hypervolume import BUDGETS
from consistency_reg.lab.report.looks import Looks, errors, whisker_marks
from consistency_reg.lab.report.runs import Run
from consistency_reg.optional import require

with require("plots"):
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLE = "Frontier as deployed"
CAPTION = (
    "Changes against the baseline of the same seed without any bias: a line for each cell through the strengths of "
    "cache-aware routing, from 0 (the model as it is) on, means over the seeds, whiskers from the lowest to the "
    "highest seed. Hollow: the bias alone, on the baseline, without training. Next to a point the strength. A "
    "cross: an expert under a tenth of its fair share, or the global balance given up. The line at +0.5% perplexity is "
    "the budget of the table. The second panel shows what costs little."
)
COST = "perplexity, change against the baseline (%)\n← better"
CHEAP = 0.012  # change of perplexity up to which points are shown in the second panel
STYLES = ("-", ":", "-.", (0, (6, 1)))  # of cells that share a colour


def draw(findings: Findings, looks: Looks) -> Figure | None:
    """Draw perplexity against LRU misses, all of it and what costs little; None without cache-aware routing."""
    strengths = _usual(findings)
    if strengths.empty:
        return None
    runs = findings.run_of_cell
    styles = _styles(strengths, looks, runs)
    figure, both = panels(1, 2, 11, 5.4, widths=(2, 3))
    for axes, part in zip(both, (strengths, _cheap(strengths)), strict=True):
        for _, cell in part.groupby(["against", "cell"], sort=False):
            run = runs[cell["cell"].iloc[0]]
            _line(axes, cell, looks, run, styles[run.cell])
            if axes is both[1]:  # in the panel that has room for them
                _strengths(axes, cell[cell["left_out"] == 0])
        axes.axhline(0, color="0.6", linewidth=0.8)
        axes.axvline(0, color="0.6", linewidth=0.8)
        axes.axhline(100 * BUDGETS[0].mean, color="0.5", linewidth=1, linestyle=":")
        axes.margins(0.08, 0.1)
        axes.set_xlabel(_label(strengths))
    both[0].set_ylabel(COST)
    both[1].set_title(f"up to {100 * CHEAP:+g}% perplexity", loc="left", fontsize=11)
    handles = [line for line in both[0].get_lines() if not str(line.get_label()).startswith("_")]
    if strengths["left_out"].any():
        handles.append(entry("left out", "x", color="0.4", markersize=6))
    legend_below(figure, handles)
    return figure


def explore(findings: Findings, looks: Looks) -> Explored | None:
    """Return the same with every point to be pointed at and opened; None without cache-aware routing."""
    strengths = _usual(findings)
    if strengths.empty:
        return None
    runs = findings.run_of_cell
    charts = []
    for part, title in ((strengths, "all"), (_cheap(strengths), f"up to {100 * CHEAP:+g}% perplexity")):
        marks = [_mark(row, looks, runs[row["cell"]]) for _, row in part.iterrows()]
        pale = [mark.but(alpha=0.4, text="") for mark in marks]
        ends = whisker_marks(part, "misses_change", pale)
        kept = [mark.but(alpha=0.6) for mark in marks if not mark.crossed]
        places = [mark.x for mark in marks if isinstance(mark.x, float)]
        budget = Mark(min(places), 100 * BUDGETS[0].mean, x2=max(places), alpha=0.6)
        layers = [*spans([budget, *ends]), *lines(kept, width=1.8), *points(marks, size=60), *texts(marks)]
        charts.append(plane(layers, _label(strengths), COST, title=title, zeros=True))
    return Explored("deployed", TITLE, CAPTION, charts)


def _usual(findings: Findings) -> pd.DataFrame:
    """Return the rows of the first setting, which is the usual one where it was measured."""
    strengths = findings.strengths.dropna(subset=["misses_change_mean", "perplexity_change_mean"])
    return strengths[strengths["deployed"].isin(strengths["deployed"].head(1))]


def _cheap(strengths: pd.DataFrame) -> pd.DataFrame:
    return strengths[strengths["perplexity_change_mean"] <= CHEAP]


def _label(strengths: pd.DataFrame) -> str:
    return f"LRU misses with {strengths['deployed'].iloc[0]} a layer,\nchange against the baseline (%)   ← better"


def _styles(strengths: pd.DataFrame, looks: Looks, runs: dict[str, Run]) -> dict[str, Any]:
    """Return a style of line for each cell: cells of one term at several weights share colour and shape."""
    styles, seen = {}, Counter[str]()
    for cell in dict.fromkeys(strengths["cell"]):
        colour = looks.colour(runs[cell])
        styles[cell] = STYLES[seen[colour] % len(STYLES)]
        seen[colour] += 1
    return styles


def _line(axes: Axes, cell: pd.DataFrame, looks: Looks, run: Run, dashes: Any) -> None:
    """Draw a cell's points, joined in the order of the strengths."""
    colour, shape = looks.colour(run), looks.shape(run)
    kept = cell[cell["left_out"] == 0]
    alone = run.loss == "none"
    style: dict[str, Any] = {"color": colour, "marker": shape, "markersize": 6, "linewidth": 1.5, "zorder": 3}
    style |= {"markerfacecolor": "white", "linestyle": "--"} if alone else {"linestyle": dashes}
    xs, ys = 100 * kept["misses_change_mean"], 100 * kept["perplexity_change_mean"]
    axes.plot(xs, ys, label=f"{run.cell} (bias alone)" if alone else run.cell, **style)
    for _, row in cell.iterrows():
        x, y = 100 * row["misses_change_mean"], 100 * row["perplexity_change_mean"]
        if row["left_out"]:
            axes.plot(x, y, "x", color=colour, alpha=0.5, markersize=6, zorder=2)
        else:
            axes.errorbar(x, y, **errors(row, "misses_change"), fmt="none", ecolor=colour, elinewidth=0.8, alpha=0.5)


def _strengths(axes: Axes, cell: pd.DataFrame) -> None:
    """Write the strength next to each point, but for the model as it is."""
    for _, row in cell[cell["strength"] > 0].iterrows():
        place = 100 * row["misses_change_mean"], 100 * row["perplexity_change_mean"]
        axes.annotate(f"{row['strength']:g}", place, (4, 4), textcoords="offset points", fontsize=7, color="0.3")


def _mark(row: pd.Series, looks: Looks, run: Run) -> Mark:
    x, y = 100 * row["misses_change_mean"], 100 * row["perplexity_change_mean"]
    balance = f"smallest share {number(2)(row['smallest_share_min']) or 'unknown'}"
    said = f"strength {row['strength']:g}: {change(x / 100)} misses, {change(y / 100)} perplexity, {balance}"
    more = {"line": f"{row['against']} {row['cell']}", "order": float(row["strength"]), "say": said}
    more["text"] = f"{row['strength']:g}" if row["strength"] else ""
    return looks.mark(run, x, y, id=f"{CELL}{row['cell']}", crossed=bool(row["left_out"]), **more)
