"""Compare design choices at equal budget: what one choice changes while all others, the seed and the tokens stay."""

from collections.abc import Sequence

from consistency_reg.lab.report.measured import BALANCE_SD, HITS, PERPLEXITY, SRP
from consistency_reg.lab.report.pairs import Pair, over_seeds
from consistency_reg.lab.report.runs import Run
from consistency_reg.optional import require

with require("plots"):
    import pandas as pd

# Differences to the reference: of misses and perplexity relative, of SRP and of the balance SD absolute.
EFFECTS = {"misses": HITS, "perplexity": PERPLEXITY, "srp": SRP, "sd": BALANCE_SD}
REFERENCES = ("baseline", "off", "none")
COLUMNS = ["choice", "value", "reference", "among", "seed", "active_parameters", *EFFECTS]


def effect_frame(runs: Sequence[Run], baseline: str | None = None) -> pd.DataFrame:
    """Return a row for each value of each axis, among each choice of the others: differences to a reference.

    The reference of an axis is ``baseline`` where it is one of its values, else the first of :data:`REFERENCES` that
    is, in any case of letters, else the first value. Runs that belong to no ablation have one axis, their cell.

    Returns:
        "choice", "value", "reference", "among", "seeds", "active_parameters", and for each name of :data:`EFFECTS`
        "name_mean", "name_min", "name_max" over the seeds. Only runs of one seed and of as many tokens are compared.
    """
    labelled = [(run, run.labels or {"cell": run.cell}) for run in runs]
    rows = []
    for axis in dict.fromkeys(axis for _, labels in labelled for axis in labels):
        on_axis = [(run, labels) for run, labels in labelled if axis in labels]
        reference = _reference([labels[axis] for _, labels in on_axis], baseline)
        groups: dict[tuple[str, int, int], dict[str, Run]] = {}
        for run, labels in on_axis:
            among = ", ".join(f"{other}={label}" for other, label in labels.items() if other != axis)
            groups.setdefault((among, run.seed, run.tokens), {})[labels[axis]] = run
        for (among, seed, _), by_value in groups.items():
            if reference in by_value:
                there = by_value.pop(reference)
                rows += [
                    [axis, value, reference, among, seed, run.active_parameters, *_differences(run, there)]
                    for value, run in by_value.items()
                ]
    frame = pd.DataFrame(rows, columns=COLUMNS)
    return over_seeds(frame, ["choice", "value", "reference", "among"], ["active_parameters"], EFFECTS)


def sign(low: float, high: float) -> str:
    """Return the sign of an effect over seeds: "+" or "-" where all agree, else "±".

    Example:
        >>> sign(0.1, 0.3), sign(-0.2, 0.1)
        ('+', '±')
    """
    return "+" if low > 0 else "-" if high < 0 else "±"


def _reference(values: Sequence[str], baseline: str | None) -> str:
    if baseline in values:
        return str(baseline)
    return next((value for word in REFERENCES for value in values if value.casefold() == word), values[0])


def _differences(run: Run, reference: Run) -> tuple[float, ...]:
    pair = Pair(run, reference)
    return tuple(pair.compared(reading) for reading in EFFECTS.values())
