"""Judge a cell by the gate: what it must reach to count as a win, and by how much it passes or fails."""

from dataclasses import dataclass

from consistency_reg.lab.recipe import routed_experts
from consistency_reg.measures import COLLAPSED_BELOW
from consistency_reg.optional import require

with require("plots"):
    import pandas as pd


@dataclass(frozen=True)
class Criterion:
    """Holds a bound on one column of :func:`~consistency_reg.lab.report.cells.cell_frame`.

    Attributes:
        name: what is bounded.
        column: of the cells.
        bound: the worst value that passes.
        at_most: whether values must be at most the bound; at least, otherwise.
        percent: whether values are shown in percent.
    """

    name: str
    column: str
    bound: float
    at_most: bool = True
    percent: bool = True

    def margin(self, value: float) -> float:
        """Return by how much a value passes; negative where it fails, NaN where it was not measured."""
        return self.bound - value if self.at_most else value - self.bound


GATE = (
    Criterion("LRU misses, mean", "misses_change_mean", -0.5),
    Criterion("perplexity, mean", "perplexity_change_mean", 0.005),
    Criterion("perplexity, worst seed", "perplexity_change_max", 0.01),
    Criterion("max/mean over baseline's, worst seed", "max_mean_ratio_max", 1.1, percent=False),
    Criterion("smallest share, worst seed", "smallest_share_min", COLLAPSED_BELOW, at_most=False, percent=False),
)
# The bar of the study of arXiv 2608.18261, which called it out of reach.
STUDY = (
    Criterion("LRU misses, mean", "misses_change_mean", -0.3),
    Criterion("perplexity, mean", "perplexity_change_mean", 0.01),
)
LEAST_SEEDS, LEAST_EXPERTS = 3, 16


def passes(cell: pd.Series, criteria: tuple[Criterion, ...]) -> bool:
    """Return whether a cell meets every criterion; one that was not measured is not met."""
    return all(criterion.margin(cell[criterion.column]) >= 0 for criterion in criteria)


def large_enough(cell: pd.Series) -> bool:
    """Return whether a cell has the seeds and the experts that the gate asks for."""
    sizes = routed_experts(cell["architecture"])
    return cell["seeds"] >= LEAST_SEEDS and sizes is not None and sizes[0] >= LEAST_EXPERTS
