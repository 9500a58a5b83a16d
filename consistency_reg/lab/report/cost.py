"""Follow what a consistency term costs and saves during training: pairs compared at each validation."""

from collections.abc import Iterable, Sequence

from consistency_reg.lab.report.curves import QUALITY, SAVING, TOKENS
from consistency_reg.lab.report.pairs import Pair
from consistency_reg.optional import require

with require("plots"):
    import pandas as pd

COLUMNS = ["against", "cell", "seed", "tokens", "perplexity_change", "misses_change"]


def cost_frame(pairs: Sequence[Pair]) -> pd.DataFrame:
    """Return changes against the baseline after as many tokens, for each validation that both runs of a pair had.

    Returns:
        "against", "cell", "seed", "tokens", "perplexity_change" and "misses_change" (relative). Empty for pairs that
        were validated once alone. Validations of other pairs within 1% of the tokens have equal "tokens": one seed
        sees a few pads more than another.
    """
    frames = []
    for pair in pairs:
        if not (pair.run.curve and pair.baseline.curve):
            continue
        run, baseline = (pd.DataFrame(one.curve).set_index(TOKENS) for one in (pair.run, pair.baseline))
        both = run.index.intersection(baseline.index)
        if len(both) < 2:
            continue
        changes = {"perplexity_change": run[QUALITY][both] / baseline[QUALITY][both] - 1}
        if SAVING in run and SAVING in baseline:
            changes["misses_change"] = (1 - run[SAVING][both]) / (1 - baseline[SAVING][both]) - 1
        of_pair = {"against": pair.baseline.cell, "cell": pair.run.cell, "seed": pair.run.seed}
        frames.append(pd.DataFrame(changes).rename_axis(TOKENS).reset_index().assign(**of_pair))
    if not frames:
        return pd.DataFrame(columns=COLUMNS)
    frame = pd.concat(frames, ignore_index=True).reindex(columns=COLUMNS)
    frame[TOKENS] = frame[TOKENS].map(_aligned(frame[TOKENS].unique().tolist()))
    return frame


def _aligned(tokens: Iterable[int]) -> dict[int, int]:
    """Map each number of tokens to the least one that is within 1% of it, step by step upwards.

    Example:
        >>> _aligned([2000, 1000, 1004])
        {1000: 1000, 1004: 1000, 2000: 2000}
    """
    aligned: dict[int, int] = {}
    mark = 0
    for count in sorted(tokens):
        mark = mark if count <= 1.01 * mark else count
        aligned[count] = mark
    return aligned
