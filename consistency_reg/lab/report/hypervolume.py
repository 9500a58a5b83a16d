"""Compare losses over all their weights: the hypervolume of what they reach, and the best within a budget."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from consistency_reg.optional import require

with require("plots"):
    import pandas as pd

# Changes of perplexity and of LRU misses against the baseline from which the area counts: 5% more, none fewer.
REFERENCE = (0.05, 0.0)


@dataclass(frozen=True)
class Budget:
    """Holds the most perplexity that a cell may cost: on average over its seeds, and for each seed."""

    mean: float
    each: float


BUDGETS = (Budget(0.005, 0.01), Budget(0.005, 0.005), Budget(0.01, 0.01))


def hypervolume(points: Iterable[tuple[float, float]], reference: tuple[float, float]) -> float:
    """Return the area that points dominate up to a reference point; small coordinates are better.

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
    """Return a row for each loss over all its weights, the largest hypervolume first: see :func:`rank`.

    Args:
        pairs: of :func:`~consistency_reg.lab.report.pairs.pair_frame`.
        cells: of :func:`~consistency_reg.lab.report.cells.cell_frame`.
    """
    return rank(pairs, cells, by="loss", along="weight", within=["against"])


def rank(points: pd.DataFrame, means: pd.DataFrame, *, by: str, along: str, within: Sequence[str]) -> pd.DataFrame:
    """Return a row for each value of a column, such as each loss, by what its points reach; the largest first.

    Args:
        points: a row for each seed and point, with "seed", "left_out", "perplexity_change" and "misses_change".
        means: the same over the seeds, with "left_out" and means and extremes of the changes.
        by: the column whose values are compared, such as "loss".
        along: the column that tells the points of one value apart, such as "weight".
        within: the columns that points must have in common to be compared.

    Returns:
        The columns ``within`` and ``by``; "weights" (named by ``along``) and "seeds" (lists), "left_out" and "runs"
        (how many); "volume_mean", "volume_std", "volume_min", "volume_max" over the seeds as a share of the box between
        :data:`REFERENCE` and (0, -1); "behind_mean", "behind_min", "behind_max", the same seed's volume of the first
        value less this one's; and for each budget "best 0", "best 1".. the row of ``means`` with the fewest misses,
        None where none is within it.
    """
    rows = []
    for key, of_baseline in points.groupby(list(within), sort=False):
        common = dict(zip(within, key, strict=True))
        alike = means[(means[list(within)] == pd.Series(common)).all(axis=1)]
        volumes = {value: _by_seed(group) for value, group in of_baseline.groupby(by, sort=False)}
        first = max(volumes.values(), key=lambda volume: volume.mean())
        for value, volume in sorted(volumes.items(), key=lambda item: -item[1].mean()):
            group = of_baseline[of_baseline[by] == value]
            kept = alike[(alike[by] == value) & (alike["left_out"] == 0)]
            behind = (first - volume).dropna()
            rows.append(
                {
                    **common,
                    by: value,
                    f"{along}s": sorted(set(group[along])),
                    "seeds": sorted(set(group["seed"])),
                    "runs": len(group),
                    "left_out": int(group["left_out"].sum()),
                    **{f"volume_{name}": one for name, one in volume.agg(["mean", "std", "min", "max"]).items()},
                    **{f"behind_{name}": one for name, one in behind.agg(["mean", "min", "max"]).items()},
                    **{f"best {i}": best_within(kept, budget) for i, budget in enumerate(BUDGETS)},
                }
            )
    return pd.DataFrame(rows)


def _by_seed(pairs: pd.DataFrame) -> pd.Series:
    """Return the hypervolume of each seed's points, as a share of the box."""
    box = REFERENCE[0] * (REFERENCE[1] + 1)
    volumes = {}
    for seed, group in pairs.groupby("seed"):
        kept = group[~group["left_out"]].dropna(subset=["perplexity_change", "misses_change"])
        points: Sequence[tuple[float, float]] = list(zip(kept["perplexity_change"], kept["misses_change"], strict=True))
        volumes[seed] = hypervolume(points, REFERENCE) / box
    return pd.Series(volumes)


def best_within(means: pd.DataFrame, budget: Budget) -> pd.Series | None:
    """Return the row with the fewest misses within a budget of perplexity; None where none is within it."""
    within = means[
        (means["perplexity_change_mean"] <= budget.mean) & (means["perplexity_change_max"] <= budget.each)
    ].dropna(subset="misses_change_mean")
    return None if within.empty else within.loc[within["misses_change_mean"].idxmin()]
