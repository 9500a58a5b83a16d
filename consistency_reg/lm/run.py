"""How far a run is: progress.json in its folder, and its throughput."""

import signal
import threading
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from consistency_reg.files import write_json


class RunProgress(Callback):
    """Keeps ``progress.json`` current, counts tokens and seconds of training, and makes Ctrl-C wait for whole steps.

    The first Ctrl-C ends the step, saves ``checkpoints/last.ckpt`` and stops, so that a resumed run repeats nothing;
    the second stops at once, and what was trained since the last checkpoint is lost.

    Args:
        run_dir: the folder of the run.
        interval: seconds between two writes.
    """

    def __init__(self, run_dir: Path, interval: float = 2.0) -> None:
        self.run_dir = run_dir
        self.interval = interval
        self.tokens = 0
        self.seconds = 0.0
        self._written = 0.0
        self._step_began = 0.0
        self._stop = False
        self._handler: Any = None

    @property
    def tokens_per_second(self) -> float:
        """Training throughput; validation and set-up do not count."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take Ctrl-C."""
        if threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGINT, self._end_after_this_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give Ctrl-C back."""
        self._give_back()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give Ctrl-C back."""
        self._give_back()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Stop if Ctrl-C came during the step before, which is saved and logged by now; else start the clock."""
        if self._stop:
            raise KeyboardInterrupt
        self._step_began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the step, write now and then, and save if Ctrl-C came."""
        self.seconds += time.perf_counter() - self._step_began
        self.tokens += batch["input_ids"].numel() * trainer.world_size
        self._write(trainer, "train")
        if self._stop:
            trainer.save_checkpoint(self.run_dir / "checkpoints" / "last.ckpt")

    def on_validation_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        """Write now and then."""
        self._write(trainer, "validate")

    def state_dict(self) -> dict[str, Any]:
        """Tokens and seconds so far."""
        return {"tokens": self.tokens, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.tokens, self.seconds = state_dict["tokens"], state_dict["seconds"]

    def _end_after_this_step(self, *_: Any) -> None:
        self._stop = True
        self._give_back()

    def _give_back(self) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            self._handler = None

    def _write(self, trainer: Trainer, phase: str) -> None:
        now = time.monotonic()
        if not trainer.is_global_zero or now - self._written < self.interval:
            return
        self._written = now
        cross_entropy = trainer.callback_metrics.get("train/ce")
        write_json(
            self.run_dir / "progress.json",
            {
                "phase": phase,
                "step": trainer.global_step,
                "total_steps": trainer.max_steps,
                "ce": None if cross_entropy is None else float(cross_entropy),
                "tokens_per_s": self.tokens_per_second,
            },
        )
