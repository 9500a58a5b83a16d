"""Show the progress of a whole training in one bar: the time that remains, and how good the model is now."""

import math
import time
from typing import Any

from consistency_reg.callbacks.monitor import RoutingMonitor
from consistency_reg.callbacks.trainer_state import callbacks_of, total_steps
from consistency_reg.measures import CROSS_ENTROPY
from consistency_reg.measures.reading import TRAINING
from consistency_reg.optional import require

with require("lightning"):
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import RichProgressBar

SMOOTHING = 0.9
TRAINING_LOSS = CROSS_ENTROPY.at().within(TRAINING).name


class TrainingBar(RichProgressBar):
    """Show a bar over all optimizer steps, not one for each epoch, with elapsed and remaining time.

    It shows perplexity (of a smoothed ``train/ce``), and SRP and LRU misses as a
    :class:`~consistency_reg.callbacks.RoutingMonitor` of the trainer measured them last.

    Args:
        interval: seconds between two looks at the numbers, as a look makes a GPU's host wait.
    """

    def __init__(self, interval: float = 0.5) -> None:
        super().__init__(refresh_rate=4)
        self.interval = interval
        self._looked = 0.0
        self._shown: dict[str, Any] = {}
        self._cross_entropy = math.nan

    @property
    def total_train_batches(self) -> int | float:
        """Return the optimizer steps of the whole training."""
        return total_steps(self.trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the bar; that of a resumed run begins where the run stopped."""
        if self.train_progress_bar_id is None:
            super().on_train_epoch_start(trainer, pl_module)
            if self.progress is not None and self.train_progress_bar_id is not None:
                self.progress.reset(self.train_progress_bar_id, completed=trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar by a step."""
        self._update(self.train_progress_bar_id, trainer.global_step)
        self._update_metrics(trainer, pl_module)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return what stands behind the bar."""
        now = time.monotonic()
        if now - self._looked >= self.interval:
            self._looked = now
            self._shown = self._numbers(trainer)
        return self._shown

    def _numbers(self, trainer: Trainer) -> dict[str, str]:
        shown = {}
        if (logged := trainer.callback_metrics.get(TRAINING_LOSS)) is not None:
            new = float(logged)
            old = new if math.isnan(self._cross_entropy) else self._cross_entropy
            self._cross_entropy = SMOOTHING * old + (1 - SMOOTHING) * new
            shown["perplexity"] = f"{math.exp(min(self._cross_entropy, 700)):.1f}"
        return shown | {name: f"{100 * value:.1f}%" for name, value in current_routing(trainer).items()}

    def _get_train_description(self, current_epoch: int) -> str:
        return f"{'training':{len(self.validation_description)}}"


def current_routing(trainer: Trainer) -> dict[str, float]:
    """Return SRP and misses as the trainer's monitor measured them last; empty before that, or without one."""
    return next((monitor.current for monitor in callbacks_of(trainer, RoutingMonitor)), {})
