"""Read the course of a run: what its validations measured, by the tokens seen until then."""

from pathlib import Path

from consistency_reg.control.reference_curve import metrics_files
from consistency_reg.lab.report.measured import HITS, PERPLEXITY
from consistency_reg.optional import require

with require("plots"):
    import numpy as np
    import pandas as pd

TOKENS, QUALITY, SAVING = "tokens", PERPLEXITY.name, HITS.name  # the columns of a curve
Curve = dict[str, list[float]]


def read_curve(folder: Path, steps: int, tokens: int) -> Curve:
    """Return perplexity and LRU hit rate at each validation, from metrics.csv and its predecessors.

    Args:
        folder: of the run.
        steps: of the whole run.
        tokens: of the whole run.
    """
    files = [path for path in metrics_files(folder) if path.stat().st_size]
    return curve(pd.concat([pd.read_csv(path) for path in files]), steps, tokens) if files else {}


def curve(history: pd.DataFrame, steps: int, tokens: int) -> Curve:
    """Return the curve of logged rows with a ``step``; {} where no validation was logged.

    Lightning logs a validation between two steps under the number of steps before the last, one at the end under the
    number of all steps: both are mapped to the steps taken. A step that was logged twice counts as it was last.
    """
    if QUALITY not in history or "step" not in history or not steps:
        return {}
    kept = [name for name in ("step", QUALITY, SAVING) if name in history]
    measured = history.loc[np.isfinite(history[QUALITY]), kept]
    taken = (measured["step"] + 1).clip(upper=steps)
    measured = measured.assign(**{TOKENS: (taken * tokens / steps).round().astype(int)})
    measured = measured.drop_duplicates(TOKENS, keep="last").sort_values(TOKENS)
    return {name: measured[name].tolist() for name in (TOKENS, QUALITY, SAVING) if name in measured}
