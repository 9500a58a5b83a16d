"""Our design ablation beside the published one."""

from typing import Any

from consistency_reg.lab.render.palette import COLOURS
from consistency_reg.lab.render.png import panels, whiskers
from consistency_reg.lab.report.findings import Findings
from consistency_reg.lab.report.looks import Looks
from consistency_reg.lab.report.published import BASELINE, agreement
from consistency_reg.optional import require

with require("plots"):
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CAPTION = (
    "The ten published designs (arXiv 2505.16056): SRP there and here, without and with the term; whiskers from the "
    "lowest to the highest seed. Lines cross at the baseline: a design in the lower left or upper right quarter has "
    "the published sign; filled points have it, hollow ones have not."
)


def draw(findings: Findings, looks: Looks) -> Figure | None:
    """A panel for each term; None where the designs are not the published ones."""
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
        name = "without a term" if term == "none" else f"with {term}"
        one = agreed.loc[term]
        said = f"{one['signs']:.0f} of {one['effects']:.0f} signs, Spearman {one['spearman_srp']:.2f}"
        axes.set_title(f"{name}: {said}", loc="left", fontsize=11)
        axes.set_xlabel("SRP as published, segments of 16 tokens (%)")
        axes.margins(0.2, 0.1)
    every[0].set_ylabel("SRP here, segments of 16 tokens (%)")
    return figure


def _point(axes: Axes, row: pd.Series, base: pd.Series, place: int) -> None:
    errors = whiskers(row["effect_mean"], row["effect_min"], row["effect_max"])
    colour = "black" if row["design"] == BASELINE else COLOURS[0] if row["agrees"] else COLOURS[1]
    face = "white" if row["agrees"] is False else colour
    style: dict[str, Any] = {"color": colour, "capsize": 2.5, "markersize": 7, "elinewidth": 1, "markerfacecolor": face}
    axes.errorbar(row["srp"], row["srp_mean"], yerr=errors, fmt="o", **style)
    offset, side = ((8, -4), "left") if place % 2 else ((-8, -4), "right")  # neighbours lie along a diagonal
    axes.annotate(row["design"], (row["srp"], row["srp_mean"]), offset, textcoords="offset points", ha=side, fontsize=9)
