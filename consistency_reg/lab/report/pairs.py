"""Compare in pairs: a run against the run that differs from it in the consistency term alone."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from consistency_reg.lab.render.verdict import CV_RATIO_AT_MOST
from consistency_reg.lab.report.measured import GLOBAL_CV, HITS, LOCAL_GAIN, MAX_MEAN, MIN_SHARE, PERPLEXITY, SRP
from consistency_reg.lab.report.runs import Run, loss_labels
from consistency_reg.measures.reading import Reading
from consistency_reg.optional import require

with require("plots"):
    import pandas as pd


@dataclass(frozen=True)
class Pair:
    """Holds a run and its baseline of the same seed, weights at first and data; NaN where not measured."""

    run: Run
    baseline: Run

    def compared(self, reading: Reading) -> float:
        """Return how the run stands next to its baseline in a measure: see :meth:`Reading.compare`."""
        return reading.compare(self.run.get(reading), self.baseline.get(reading))

    @property
    def left_out(self) -> bool:
        """Return whether the run is excluded from comparisons: it collapsed, or gave up global balance."""
        return self.run.collapsed or self.compared(GLOBAL_CV) > CV_RATIO_AT_MOST


CHANGES = {  # columns of frames of pairs, and the measures that they compare
    "misses_change": HITS,  # relative: -0.3 is 30% fewer
    "perplexity_change": PERPLEXITY,  # relative
    "srp_change": SRP,  # a difference
    "local_gain_change": LOCAL_GAIN,  # a difference
    "smallest_share": MIN_SHARE,  # of the run by itself
    "max_mean_ratio": MAX_MEAN,  # a multiple of the baseline's
    "cv_ratio": GLOBAL_CV,  # a multiple of the baseline's
}


def pair_runs(runs: Sequence[Run], baseline: str | None = None) -> list[Pair]:
    """Return each run with its baseline of the same seed; runs without one are left out.

    Of several baselines one of the run's own device is taken, if there is one: another device trains another model of
    the same recipe and seed.

    Args:
        runs: all runs.
        baseline: name of a run or of a cell (a name without its seed) that all others are compared with; when None,
            every run with a consistency term is compared with the run without it and with all else equal.

    Raises:
        ValueError: no run of that name.
    """
    if baseline is None:
        baselines = [run for run in runs if run.loss == "none"]
        alike = [(run, [other for other in baselines if other.pair == run.pair]) for run in runs if run.loss != "none"]
        return [_pair(run, candidates) for run, candidates in alike if candidates]
    baselines = [run for run in runs if baseline in (run.name, run.cell)]
    if not baselines:
        names = ", ".join(sorted({run.cell for run in runs}))
        raise ValueError(f"--baseline must name a run or a cell, got {baseline!r}; there are {names}")
    alike = [(run, [other for other in baselines if other.seed == run.seed]) for run in runs if run not in baselines]
    return [_pair(run, candidates) for run, candidates in alike if candidates]


def _pair(run: Run, baselines: Sequence[Run]) -> Pair:
    return Pair(run, next((other for other in baselines if other.device == run.device), baselines[0]))


def pair_frame(pairs: Sequence[Pair]) -> pd.DataFrame:
    """Return a row for each pair: which it is, :data:`CHANGES`, and whether it is left out of comparisons."""
    labels = loss_labels([pair.run for pair in pairs])
    rows = [
        {
            "against": pair.baseline.cell,
            "cell": pair.run.cell,
            "seed": pair.run.seed,
            "loss": labels[pair.run.name],
            "weight": pair.run.weight,
            "architecture": pair.run.architecture,
            "left_out": pair.left_out,
            **{name: pair.compared(reading) for name, reading in CHANGES.items()},
        }
        for pair in pairs
    ]
    columns = ["against", "cell", "seed", "loss", "weight", "architecture", "left_out", *CHANGES]
    return pd.DataFrame(rows, columns=columns)


def over_seeds(frame: pd.DataFrame, by: Sequence[str], same: Sequence[str], changes: Iterable[str]) -> pd.DataFrame:
    """Return a row for each group of seeds.

    Args:
        frame: a row for each seed, with "seed" and, where runs may be excluded, "left_out".
        by: columns that the rows of a group have in common.
        same: columns that are kept as they are in a group's first row.
        changes: columns to aggregate.

    Returns:
        ``by``, ``same``, "seeds" (how many), "left_out" (how many of the seeds), and for each of ``changes``
        "name_mean", "name_min" and "name_max".
    """
    groups = frame.groupby(list(by), sort=False)
    counted = groups[list(same)].first().assign(seeds=groups.size())
    if "left_out" in frame:
        counted["left_out"] = groups["left_out"].sum()
    aggregated = groups[list(changes)].agg(["mean", "min", "max"])
    aggregated.columns = [f"{name}_{over}" for name, over in aggregated.columns]
    return counted.join(aggregated).reset_index()


def mean_and_range(row: pd.Series, name: str) -> tuple[float, float, float]:
    """Return the mean, the lowest and the highest of a change, from a row of :func:`over_seeds`."""
    return row[f"{name}_mean"], row[f"{name}_min"], row[f"{name}_max"]
