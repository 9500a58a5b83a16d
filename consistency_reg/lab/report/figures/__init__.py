"""The figures of a report, a module each: ``draw`` makes a PNG, ``explore`` charts for the page."""

from collections.abc import Iterator

from consistency_reg.lab.render.charts import Figure
from consistency_reg.lab.render.png import Picture, png
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


def pictures(findings: Findings, source: str = "") -> Iterator[Picture]:
    """Draw every figure that the runs have something for.

    Args:
        findings: of the report.
        source: what the runs were read from, kept in each PNG's metadata.
    """
    looks = Looks.of(findings.runs, findings.pairs)
    for name, module in DRAWN.items():
        figure = module.draw(findings, looks)
        if figure is not None:
            yield Picture(name, module.CAPTION, png(figure, source))


def explored(findings: Findings) -> list[Figure]:
    """Return the charts of every figure that the runs have something for."""
    looks = Looks.of(findings.runs, findings.pairs)
    found = (module.explore(findings, looks) for module in DRAWN.values())
    return [figure for figure in found if figure is not None]
