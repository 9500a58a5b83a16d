"""What a consistency term costs and saves as training goes on: pairs compared at each validation."""

from collections.abc import Collection, Sequence

from consistency_reg.optional import require
from consistency_reg.report.curves import MISSES_FROM, PERPLEXITY, TOKENS
from consistency_reg.report.pairs import Pair

with require("plots"):
    import pandas as pd

COLUMNS = ["against", "cell", "seed", "tokens", "perplexity_change", "misses_change"]


def cost_frame(pairs: Sequence[Pair], cells: Collection[str]) -> pd.DataFrame:
    """Changes against the baseline after as many tokens, for each validation that both runs of a pair had.

    Args:
        pairs: all pairs.
        cells: the cells to show.

    Returns:
        "against", "cell", "seed", "tokens", "perplexity_change" and "misses_change" (relative). Empty for pairs that
        were validated once alone.
    """
    frames = []
    for pair in pairs:
        if pair.run.cell not in cells or not (pair.run.curve and pair.baseline.curve):
            continue
        run, baseline = (pd.DataFrame(one.curve).set_index(TOKENS) for one in (pair.run, pair.baseline))
        both = run.index.intersection(baseline.index)
        if len(both) < 2:
            continue
        changes = {"perplexity_change": run[PERPLEXITY][both] / baseline[PERPLEXITY][both] - 1}
        if MISSES_FROM in run and MISSES_FROM in baseline:
            changes["misses_change"] = (1 - run[MISSES_FROM][both]) / (1 - baseline[MISSES_FROM][both]) - 1
        of_pair = {"against": pair.baseline.cell, "cell": pair.run.cell, "seed": pair.run.seed}
        frames.append(pd.DataFrame(changes).rename_axis(TOKENS).reset_index().assign(**of_pair))
    return pd.concat(frames).reindex(columns=COLUMNS) if frames else pd.DataFrame(columns=COLUMNS)
