"""Compare the cells of an ablation over their seeds: what each gains and costs, and which another one dominates."""

from consistency_reg.lab.report.pairs import CHANGES, over_seeds
from consistency_reg.optional import require

with require("plots"):
    import pandas as pd

BASELINE = "the baseline"


def cell_frame(pairs: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each cell: mean, lowest and highest over its seeds, and what dominates it.

    Args:
        pairs: of :func:`~consistency_reg.lab.report.pairs.pair_frame`.

    Returns:
        "against", "cell", "loss", "weight", "architecture", "seeds", "left_out" (how many of the seeds), for every name
        of :data:`~consistency_reg.lab.report.pairs.CHANGES` "name_mean", "name_min" and "name_max", and "dominated_by":
        the cells that are no worse in LRU misses and in perplexity and better in one of them, by their means. A cell
        of which a run is left out dominates none.
    """
    cells = over_seeds(pairs, ["against", "cell"], ["loss", "weight", "architecture"], CHANGES)
    cells["dominated_by"] = [", ".join(_dominating(row, cells)) for _, row in cells.iterrows()]
    return cells


def chosen(cells: pd.DataFrame, perplexity: float = 0.01) -> pd.DataFrame:
    """Return one cell of each loss, for figures that cannot hold all: the fewest misses within a perplexity.

    Args:
        cells: of :func:`cell_frame`.
        perplexity: the most that it may cost on average; where each cell costs more, the one that costs least.
    """
    best = []
    for _, group in cells.groupby(["against", "loss"], sort=False):
        kept = group[group["left_out"] == 0]
        kept = group if kept.empty else kept
        cheap = kept[kept["perplexity_change_mean"] <= perplexity]
        ranked = kept.sort_values("perplexity_change_mean") if cheap.empty else cheap.sort_values("misses_change_mean")
        best.append(ranked.index[0])
    return cells.loc[best]


def _dominating(cell: pd.Series, cells: pd.DataFrame) -> list[str]:
    misses, perplexity = cell["misses_change_mean"], cell["perplexity_change_mean"]
    rivals = cells[(cells["against"] == cell["against"]) & (cells["left_out"] == 0)]
    no_worse = (rivals["misses_change_mean"] <= misses) & (rivals["perplexity_change_mean"] <= perplexity)
    better = (rivals["misses_change_mean"] < misses) | (rivals["perplexity_change_mean"] < perplexity)
    baseline = [BASELINE] if misses >= 0 and perplexity >= 0 and max(misses, perplexity) > 0 else []
    return baseline + rivals.loc[no_worse & better, "cell"].tolist()
