"""Draw our design ablation next to the published one."""

from typing import Any

from consistency_reg.lab.render.charts import Figure as Explored
from consistency_reg.lab.render.charts import Mark, plane, points, spans, texts
from consistency_reg.lab.render.palette import COLOURS, css_name
from consistency_reg.lab.render.png import panels, whiskers
from consistency_reg.lab.report.findings import Findings
from consistency_reg.lab.report.looks import Looks
from consistency_reg.lab.report.pairs import mean_and_range
from consistency_reg.lab.report.published import BASELINE, agreement
from consistency_reg.optional import require

with require("plots"):
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLE = "The published designs and ours"
CAPTION = (
    "The ten published designs (arXiv 2505.16056): SRP there and here, without and with the term; whiskers from the "
    "lowest to the highest seed. Lines cross at the baseline: a design in the lower left or upper right quarter has "
    "the published sign; filled points have it, hollow ones have not."
)


THERE, HERE = "SRP as published, segments of 16 tokens (%)", "SRP here, segments of 16 tokens (%)"


def draw(findings: Findings, looks: Looks) -> Figure | None:
    """Draw a panel for each term; None where the designs are not the published ones."""
    beside = findings.published
    if beside.empty:
        return None
    agreed = agreement(beside).set_index("term")
    figure, every = panels(1, len(agreed), 5.5 * len(agreed), 5.2)
    for axes, (term, group) in zip(every, beside.groupby("term", sort=False), strict=True):
        base = group[group["design"] == BASELINE].iloc[0]
        axes.axvline(base["srp"], color="0.6", linewidth=0.8)
        axes.axhline(base["srp_mean"], color="0.6", linewidth=0.8)
        for place, (_, row) in enumerate(group.sort_values("srp").iterrows()):
            _point(axes, row, base, place)
        axes.set_title(_title(str(term), agreed.loc[term]), loc="left", fontsize=11)
        axes.set_xlabel(THERE)
        axes.margins(0.2, 0.1)
    every[0].set_ylabel(HERE)
    return figure


def explore(findings: Findings, looks: Looks) -> Explored | None:
    """Return the same to be pointed at and filtered; None where the designs are not the published ones."""
    beside = findings.published
    if beside.empty:
        return None
    agreed = agreement(beside).set_index("term")
    charts = []
    for term, group in beside.groupby("term", sort=False):
        base = group[group["design"] == BASELINE].iloc[0]
        marks = [_mark(row) for _, row in group.iterrows()]
        placed = zip(marks, (row for _, row in group.iterrows()), strict=True)
        seeds = [mark.but(**_ends(row)) for mark, row in placed]
        (left, bottom), (right, top) = (group[["srp", "srp_mean"]].agg(end) for end in ("min", "max"))
        quarters = [Mark(left, base["srp_mean"], x2=right, alpha=0.5), Mark(base["srp"], bottom, y2=top, alpha=0.5)]
        layers = [*spans(quarters, width=0.8), *spans(seeds), *points(marks), *texts(marks)]
        charts.append(plane(layers, THERE, HERE, title=_title(str(term), agreed.loc[term])))
    return Explored("published", TITLE, CAPTION, charts)


def _title(term: str, agreed: pd.Series) -> str:
    name = "without a term" if term == "none" else f"with {term}"
    return f"{name}: {agreed['signs']:.0f} of {agreed['effects']:.0f} signs, Spearman {agreed['spearman_srp']:.2f}"


def _ends(row: pd.Series) -> dict[str, float]:
    """Return where the whisker over the seeds begins and ends."""
    base = row["srp_mean"] - row["effect_mean"]
    return {"y": base + row["effect_min"], "y2": base + row["effect_max"]}


def _mark(row: pd.Series) -> Mark:
    colour = "var(--ink)" if row["design"] == BASELINE else css_name(COLOURS[0 if row["agrees"] else 1])
    say = f"{row['design']}: {row['srp_mean']:.1f}% here, {row['srp']:.1f}% as published, {row['seeds']} seeds"
    look = {"cell": row["design"], "colour": colour, "hollow": row["agrees"] is False, "text": row["design"]}
    return Mark(row["srp"], row["srp_mean"], say=say, **look)


def _point(axes: Axes, row: pd.Series, base: pd.Series, place: int) -> None:
    errors = whiskers(*mean_and_range(row, "effect"))
    colour = "black" if row["design"] == BASELINE else COLOURS[0] if row["agrees"] else COLOURS[1]
    face = "white" if row["agrees"] is False else colour
    style: dict[str, Any] = {"color": colour, "capsize": 2.5, "markersize": 7, "elinewidth": 1, "markerfacecolor": face}
    axes.errorbar(row["srp"], row["srp_mean"], yerr=errors, fmt="o", **style)
    offset, side = ((8, -4), "left") if place % 2 else ((-8, -4), "right")  # neighbours lie along a diagonal
    axes.annotate(row["design"], (row["srp"], row["srp_mean"]), offset, textcoords="offset points", ha=side, fontsize=9)
