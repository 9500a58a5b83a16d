"""Quality against misses: the point of every validation, and the measures at the best one."""

from collections.abc import Mapping

import torch
from torch import Tensor

from consistency_reg.callbacks.loggers import STEP, TOKENS, log_scalars, logged_step, summarize
from consistency_reg.optional import require
from consistency_reg.tracking.accumulate import RoutingMeasures

with require("lightning"):
    from lightning.pytorch import Trainer

QUALITIES = ("val/ppl", "val/perplexity", "val/loss", "val_loss")


class TradeOff:
    """Logs the trade-off of a run and remembers its best validation as a whole.

    Only as a whole, because the highest SRP of a run alone may be that of a collapsed router.

    Args:
        quality: the metric, lower is better; the first of :data:`QUALITIES` that is logged when None.
    """

    def __init__(self, quality: str | None = None) -> None:
        self.quality = quality
        self.best: dict[str, float] = {}  # under the names that wandb's summary has

    def log(self, trainer: Trainer, model: Mapping[str, Tensor], measures: RoutingMeasures, tokens: int) -> None:
        """The point to every logger, the best validation so far to wandb's summary; without a quality nothing.

        Raises:
            ValueError: there is no metric of the name that was given.
        """
        logged = trainer.callback_metrics
        if self.quality is not None and self.quality not in logged:
            raise ValueError(
                f"quality must be a metric that the module logs in validation, got {self.quality!r} of {sorted(logged)}"
            )
        quality = self.quality or next((name for name in QUALITIES if name in logged), None)
        if quality is None:
            return
        value = float(logged[quality])
        names = measures.trade_off_names
        point = {names[name]: number for name, number in measures.headline(model).items()}
        point[quality.removeprefix("val/")] = value
        log_scalars(trainer, {f"tradeoff/{name}": number for name, number in point.items()})
        if value < self.best.get(f"best/{quality}", torch.inf):
            self.best = {f"best/val/{name}": float(number) for name, number in model.items()}
            self.best |= {f"best/{STEP}": logged_step(trainer), f"best/{TOKENS}": tokens, f"best/{quality}": value}
        summarize(trainer, self.best)
