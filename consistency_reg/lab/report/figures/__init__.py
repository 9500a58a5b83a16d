"""The figures of a report, a module each: ``draw`` makes a PNG, ``explore`` charts for the page."""

from consistency_reg.lab.render.charts import Figure
from consistency_reg.lab.render.png import png
from consistency_reg.lab.report.figures import (
    balance,
    cost,
    deployed,
    effects,
    frontier,
    hit_rates,
    layers,
    published,
    tradeoff,
)
from consistency_reg.lab.report.findings import Findings
from consistency_reg.lab.report.looks import Looks

DRAWN = {
    "deployed": deployed,
    "frontier": frontier,
    "tradeoff": tradeoff,
    "balance": balance,
    "layers": layers,
    "hit_rates": hit_rates,
    "cost": cost,
    "effects": effects,
    "published": published,
}


def pictures(findings: Findings, source: str = "") -> dict[str, bytes]:
    """Return the PNG of every figure that the runs have something for, by name.

    Args:
        findings: of the report.
        source: what the runs were read from, kept in each PNG's metadata.
    """
    looks = Looks.of(findings.runs, findings.pairs)
    drawn = {name: module.draw(findings, looks) for name, module in DRAWN.items()}
    return {name: png(figure, source) for name, figure in drawn.items() if figure is not None}


def explored(findings: Findings) -> list[Figure]:
    """Return the charts of every figure that the runs have something for."""
    looks = Looks.of(findings.runs, findings.pairs)
    found = (module.explore(findings, looks) for module in DRAWN.values())
    return [figure for figure in found if figure is not None]
