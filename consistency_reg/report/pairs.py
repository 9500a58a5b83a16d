"""Paired comparison: a run against the run that differs from it in the consistency term alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from consistency_reg.report.runs import MAX_MEAN, MIN_SHARE, MISSES_FROM, PERPLEXITY, SRP, Run

LOCAL_GAIN = "val/local_gain/m16"


@dataclass(frozen=True)
class Pair:
    """A run and its baseline: the same seed, so the same initial weights and data order. NaN where not measured."""

    run: Run
    baseline: Run

    @property
    def misses_change(self) -> float:
        """Relative change of the LRU misses at cache = 25% of the experts; -0.3 is 30% fewer."""
        return _ratio(1 - self._of(self.run, MISSES_FROM), 1 - self._of(self.baseline, MISSES_FROM)) - 1

    @property
    def perplexity_change(self) -> float:
        """Relative change of the perplexity; 0.01 is 1% more."""
        return _ratio(self._of(self.run, PERPLEXITY), self._of(self.baseline, PERPLEXITY)) - 1

    @property
    def srp_change(self) -> float:
        """Difference of SRP at m = 16."""
        return self._of(self.run, SRP) - self._of(self.baseline, SRP)

    @property
    def local_gain_change(self) -> float:
        """Difference of the local gain at m = 16."""
        return self._of(self.run, LOCAL_GAIN) - self._of(self.baseline, LOCAL_GAIN)

    @property
    def smallest_share(self) -> float:
        """Of the run: usage of the least used expert, as a share of its fair share."""
        return self._of(self.run, MIN_SHARE)

    @property
    def max_mean_ratio(self) -> float:
        """Max/mean usage of the run, as a multiple of the baseline's."""
        return _ratio(self._of(self.run, MAX_MEAN), self._of(self.baseline, MAX_MEAN))

    @staticmethod
    def _of(run: Run, metric: str) -> float:
        return run.metrics.get(metric, math.nan)


def pair_runs(runs: Sequence[Run], baseline: str | None = None) -> list[Pair]:
    """Each run beside its baseline of the same seed; runs without one are left out.

    Args:
        runs: all runs.
        baseline: name of a run or of a cell (a name without its seed) that all others stand beside; when None, every
            run with a consistency term stands beside the run without it and with all else equal.

    Raises:
        ValueError: no run of that name.
    """
    if baseline is None:
        without = {run.pair: run for run in reversed(runs) if run.loss == "none"}
        return [Pair(run, without[run.pair]) for run in runs if run.loss != "none" and run.pair in without]
    by_seed = {run.seed: run for run in runs if baseline in (run.name, run.cell)}
    if not by_seed:
        names = ", ".join(sorted({run.cell for run in runs}))
        raise ValueError(f"--baseline must name a run or a cell, got {baseline!r}; there are {names}")
    others = [run for run in runs if run not in by_seed.values()]
    return [Pair(run, by_seed[run.seed]) for run in others if run.seed in by_seed]


def by_cell(pairs: Sequence[Pair]) -> dict[str, list[Pair]]:
    """The pairs of a cell's seeds together.

    Example:
        >>> by_cell([])
        {}
    """
    cells: dict[str, list[Pair]] = {}
    for pair in pairs:
        cells.setdefault(pair.run.cell, []).append(pair)
    return cells


def _ratio(value: float, reference: float) -> float:
    return value / reference if reference else math.nan
