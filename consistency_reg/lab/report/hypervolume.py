"""Losses compared over all their weights: the hypervolume of what they reach, and the best within a budget."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from consistency_reg.optional import require

with require("plots"):
    import pandas as pd

# Changes of perplexity and of LRU misses against the baseline from which the area counts: 5% more, none fewer.
REFERENCE = (0.05, 0.0)


@dataclass(frozen=True)
class Budget:
    """How much perplexity a cell may cost: on average over its seeds, and each of them."""

    mean: float
    each: float


BUDGETS = (Budget(0.005, 0.01), Budget(0.005, 0.005), Budget(0.01, 0.01))


def hypervolume(points: Iterable[tuple[float, float]], reference: tuple[float, float]) -> float:
    """Area that points dominate, both coordinates to be small, within what a reference point is worse than.

    Example:
        >>> hypervolume([(1.0, 2.0), (2.0, 1.0), (2.0, 2.0)], reference=(3.0, 3.0))
        3.0
    """
    area, below = 0.0, reference[1]
    for x, y in sorted(points):
        if x < reference[0] and y < below:
            area += (reference[0] - x) * (below - y)
            below = y
    return area


def loss_frame(pairs: pd.DataFrame, cells: pd.DataFrame) -> pd.DataFrame:
    """A row for each loss, the largest hypervolume first.

    Args:
        pairs: of :func:`~consistency_reg.lab.report.pairs.pair_frame`.
        cells: of :func:`~consistency_reg.lab.report.cells.cell_frame`.

    Returns:
        "against", "loss", "weights" and "seeds" (lists), "left_out" and "runs" (how many), "volume_mean", "volume_std",
        "volume_min", "volume_max" over the seeds as a share of the box between REFERENCE and (0, -1), "behind_mean",
        "behind_min", "behind_max": the same seed's volume of the first loss less this one's; and for each budget "best
        0", "best 1".. the cell (a row of ``cells``) with the fewest misses, None where none is within it.
    """
    rows = []
    for against, of_baseline in pairs.groupby("against", sort=False):
        volumes = {loss: _by_seed(group) for loss, group in of_baseline.groupby("loss", sort=False)}
        first = max(volumes.values(), key=lambda volume: volume.mean())
        for loss, volume in sorted(volumes.items(), key=lambda item: -item[1].mean()):
            group = of_baseline[of_baseline["loss"] == loss]
            of_loss = cells[(cells["against"] == against) & (cells["loss"] == loss) & (cells["left_out"] == 0)]
            behind = (first - volume).dropna()
            rows.append(
                {
                    "against": against,
                    "loss": loss,
                    "weights": sorted(set(group["weight"])),
                    "seeds": sorted(set(group["seed"])),
                    "runs": len(group),
                    "left_out": int(group["left_out"].sum()),
                    **{f"volume_{name}": value for name, value in volume.agg(["mean", "std", "min", "max"]).items()},
                    **{f"behind_{name}": value for name, value in behind.agg(["mean", "min", "max"]).items()},
                    **{f"best {i}": _best(of_loss, budget) for i, budget in enumerate(BUDGETS)},
                }
            )
    return pd.DataFrame(rows)


def _by_seed(pairs: pd.DataFrame) -> pd.Series:
    """Hypervolume of each seed's runs, as a share of the box."""
    box = REFERENCE[0] * (REFERENCE[1] + 1)
    volumes = {}
    for seed, group in pairs.groupby("seed"):
        kept = group[~group["left_out"]].dropna(subset=["perplexity_change", "misses_change"])
        points: Sequence[tuple[float, float]] = list(zip(kept["perplexity_change"], kept["misses_change"], strict=True))
        volumes[seed] = hypervolume(points, REFERENCE) / box
    return pd.Series(volumes)


def _best(cells: pd.DataFrame, budget: Budget) -> pd.Series | None:
    within = cells[
        (cells["perplexity_change_mean"] <= budget.mean) & (cells["perplexity_change_max"] <= budget.each)
    ].dropna(subset="misses_change_mean")
    return None if within.empty else within.loc[within["misses_change_mean"].idxmin()]
