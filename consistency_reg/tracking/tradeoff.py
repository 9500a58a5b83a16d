"""Quality against misses: the point of every validation, and the measures at the best one."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from consistency_reg.tracking.accumulate import Measured, RoutingMeasures
from consistency_reg.tracking.board import STEP, TOKENS, Board

QUALITIES = ("val/ppl", "val/perplexity", "val/loss", "val_loss", "eval_loss")
LOADER = "/dataloader_idx_"  # what Lightning puts behind a metric of one of several validation dataloaders


@dataclass(frozen=True)
class Quality:
    """Hold a metric of quality, lower is better, and its value in one validation."""

    name: str
    value: float


class TradeOff:
    """Show the trade-off of a run and remember its best validation as a whole.

    Only as a whole, because the highest SRP of a run alone may be that of a collapsed router.

    Args:
        quality: the metric, lower is better; the first of :data:`QUALITIES` that is logged when None.
    """

    def __init__(self, quality: str | None = None) -> None:
        self.quality = quality
        self.best: dict[str, float] = {}  # under the names that wandb's summary has
        self._warned = False

    def show(
        self,
        board: Board,
        logged: Mapping[str, float],
        measured: Measured,
        measures: RoutingMeasures,
        *,
        step: int,
        tokens: int,
    ) -> None:
        """Show the point of a validation, and the best validation so far in the summary.

        Without a quality there is neither, which is warned of once.

        Args:
            board: where to.
            logged: the metrics of this validation by name.
            measured: what was measured of its routing.
            measures: say which measures the trade-off is about.
            step: of the trainer.
            tokens: seen in training so far.

        Raises:
            ValueError: there is no metric of the name that was given.
        """
        quality = find_quality(logged, self.quality, list(measured.tokens.values()))
        if quality is None:
            if not self._warned:
                self._warned = True
                board.warn(
                    f"no quality is logged in validation, so there is no tradeoff/ and no best/: log one of "
                    f"{', '.join(QUALITIES)}, or name yours, lower is better: quality='val/bits'"
                )
            return
        names = measures.trade_off_names
        point = {names[name]: number for name, number in measures.headline(measured.model).items()}
        point[quality.name.removeprefix("val/")] = quality.value
        board.scalars({f"tradeoff/{name}": number for name, number in point.items()})
        if quality.value < self.best.get(f"best/{quality.name}", math.inf):
            self.best = {f"best/val/{name}": float(number) for name, number in measured.model.items()}
            self.best |= {f"best/{STEP}": step, f"best/{TOKENS}": tokens, f"best/{quality.name}": quality.value}
        board.summary(self.best)


def find_quality(logged: Mapping[str, float], wanted: str | None, tokens: Sequence[int]) -> Quality | None:
    """Return the quality of a validation; that of several dataloaders is their mean, weighted by their tokens.

    Lightning logs a metric of ``validation_step`` for each dataloader, as ``val_loss/dataloader_idx_0`` and so on.

    Args:
        logged: the metrics of the validation by name.
        wanted: the name of the metric; the first of :data:`QUALITIES` that is logged when None.
        tokens: of each dataloader; all weigh the same if these are not as many.

    Raises:
        ValueError: there is no metric of the wanted name.

    Example:
        >>> find_quality({"val_loss/dataloader_idx_0": 2.0, "val_loss/dataloader_idx_1": 5.0}, None, [200, 100])
        Quality(name='val_loss', value=3.0)
    """
    for name in QUALITIES if wanted is None else (wanted,):
        if name in logged:
            return Quality(name, float(logged[name]))
        by_loader = {
            int(number): float(value)
            for key, value in logged.items()
            if key.startswith(f"{name}{LOADER}") and (number := key.removeprefix(f"{name}{LOADER}")).isdigit()
        }
        if by_loader:
            return Quality(name, _weighted_mean([by_loader[loader] for loader in sorted(by_loader)], tokens))
    if wanted is not None:
        raise ValueError(
            f"quality must be a metric that the module logs in validation, got {wanted!r} of {sorted(logged)}"
        )
    return None


def _weighted_mean(values: Sequence[float], weights: Sequence[int]) -> float:
    if len(values) != len(weights) or not sum(weights):
        weights = [1] * len(values)
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)
