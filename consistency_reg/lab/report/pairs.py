"""Compare in pairs: a run against the run that differs from it in the consistency term alone."""

from collections.abc import Sequence
from dataclasses import dataclass

from consistency_reg.lab.render.verdict import CV_RATIO_AT_MOST
from consistency_reg.lab.report.measured import GLOBAL_CV, HITS, LOCAL_GAIN, MAX_MEAN, MIN_SHARE, PERPLEXITY, SRP
from consistency_reg.lab.report.runs import Run, loss_labels
from consistency_reg.measures.reading import Reading
from consistency_reg.optional import require

with require("plots"):
    import pandas as pd
    from pandas.core.groupby import DataFrameGroupBy


@dataclass(frozen=True)
class Pair:
    """Holds a run and its baseline of the same seed, weights at first and data; NaN where not measured."""

    run: Run
    baseline: Run

    def compared(self, reading: Reading) -> float:
        """Return how the run stands next to its baseline in a measure: see :meth:`Reading.compare`."""
        return reading.compare(self.run.get(reading), self.baseline.get(reading))

    @property
    def misses_change(self) -> float:
        """Relative change of the LRU misses at cache = 25% of the experts; -0.3 is 30% fewer."""
        return self.compared(HITS)

    @property
    def perplexity_change(self) -> float:
        """Relative change of the perplexity; 0.01 is 1% more."""
        return self.compared(PERPLEXITY)

    @property
    def srp_change(self) -> float:
        """Difference of SRP at m = 16."""
        return self.compared(SRP)

    @property
    def local_gain_change(self) -> float:
        """Difference of the local gain at m = 16."""
        return self.compared(LOCAL_GAIN)

    @property
    def smallest_share(self) -> float:
        """Usage of the run's least used expert, as a share of its fair share."""
        return self.compared(MIN_SHARE)

    @property
    def max_mean_ratio(self) -> float:
        """Max/mean usage of the run, as a multiple of the baseline's."""
        return self.compared(MAX_MEAN)

    @property
    def cv_ratio(self) -> float:
        """Global CV of the run, as a multiple of the baseline's."""
        return self.compared(GLOBAL_CV)

    @property
    def left_out(self) -> bool:
        """Return whether the run is excluded from comparisons: it collapsed, or gave up global balance."""
        return self.run.collapsed or self.cv_ratio > CV_RATIO_AT_MOST


CHANGES = (
    "misses_change",
    "perplexity_change",
    "srp_change",
    "local_gain_change",
    "smallest_share",
    "max_mean_ratio",
    "cv_ratio",
)


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
            **{name: getattr(pair, name) for name in CHANGES},
        }
        for pair in pairs
    ]
    columns = ["against", "cell", "seed", "loss", "weight", "architecture", "left_out", *CHANGES]
    return pd.DataFrame(rows, columns=columns)


def over_seeds(groups: DataFrameGroupBy, names: Sequence[str]) -> pd.DataFrame:
    """Return the columns "name_mean", "name_min" and "name_max" of each group."""
    changes = groups[list(names)].agg(["mean", "min", "max"])
    changes.columns = [f"{name}_{over}" for name, over in changes.columns]
    return changes
