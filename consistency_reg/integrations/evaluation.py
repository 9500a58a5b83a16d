"""Tell which dataset of a transformers ``Trainer`` is evaluated, and when an evaluation has all of its datasets."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Evaluated:
    """Holds an evaluation whose datasets are all done.

    Attributes:
        prefix: of its names in the log, such as "eval".
        names: of its datasets, by number.
        logged: the numbers that the trainer logged, with ``eval_loss/dataloader_idx_N`` of each of several datasets.
    """

    prefix: str
    names: list[str]
    logged: dict[str, float]


class EvaluationProgress:
    """Follows an evaluation from dataset to dataset: a trainer logs the datasets of a mapping one after the other.

    Attributes:
        batches: those of the present dataset so far.
    """

    def __init__(self) -> None:
        self.batches = 0
        self._done: dict[str, dict[str, float]] = {}  # the logs of the datasets before this one, of a mapping

    @property
    def begun(self) -> bool:
        """Return whether something was evaluated that has not ended."""
        return bool(self._done or self.batches)

    @property
    def dataset(self) -> int:
        """Return the number of the present dataset."""
        return len(self._done)

    def begin(self) -> None:
        """Begin an evaluation, and forget one that was not finished."""
        self.batches, self._done = 0, {}

    def name(self, datasets: Any) -> str:
        """Return the name of the present dataset: its own in a mapping, otherwise "eval"."""
        names = _names(datasets)
        return names[self.dataset] if self.dataset < len(names) else "eval"

    def end_dataset(self, prefix: str, logs: Mapping[str, Any], datasets: Any) -> Evaluated | None:
        """End a dataset; return the evaluation if this was its last one.

        Args:
            prefix: of the names that the trainer logged the dataset under, such as "eval" or "eval_code".
            logs: what it logged.
            datasets: all of the trainer's.

        Example:
            >>> progress, datasets = EvaluationProgress(), {"code": [], "prose": []}
            >>> progress.end_dataset("eval_code", {"eval_code_loss": 2.0}, datasets)
            >>> progress.end_dataset("eval_prose", {"eval_prose_loss": 3.0}, datasets).names
            ['code', 'prose']
        """
        logged = {name: float(value) for name, value in logs.items() if isinstance(value, int | float)}
        names, dataset = _names(datasets), prefix.removeprefix("eval_")
        if self.dataset >= len(names) or names[self.dataset] != dataset:  # not one of those that are evaluated in turn
            return Evaluated(prefix, [f"{number}" for number in range(self.dataset)] + [dataset], logged)
        self._done[dataset], self.batches = logged, 0
        if len(self._done) < len(names):
            return None
        losses = [of.get(f"eval_{name}_loss", math.nan) for name, of in self._done.items()]
        return Evaluated(
            "eval", names, logged | {f"eval_loss/dataloader_idx_{i}": loss for i, loss in enumerate(losses)}
        )


def _names(datasets: Any) -> list[str]:
    return list(datasets) if isinstance(datasets, dict) else []
