"""How far a run is: progress.json in its folder, its throughput, and how Ctrl-C and SIGTERM end it."""

import math
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from consistency_reg.callbacks.progress import current_routing, total_steps
from consistency_reg.lab.cli import TERMINATED
from consistency_reg.lab.files import write_json
from consistency_reg.session import RoutingSession

SIGNALS: dict[int, str] = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
SAME_SECONDS = 2.0  # a scheduler's SIGTERM to all processes comes once more through torchrun


class RunProgress(Callback):
    """Keeps ``progress.json`` current, counts tokens and seconds of training, and makes a signal wait for whole steps.

    The first Ctrl-C or SIGTERM ends the optimizer step with all its micro-batches (in a validation, the one after it),
    saves ``checkpoints/last.ckpt`` and stops, so that a resumed run repeats and loses nothing; the second stops at
    once, and what was trained since the last checkpoint is lost. Where one process gets a signal, all stop. The end of
    training is saved too, for the validation that follows.

    ``progress.json`` holds ``phase``, ``step``, ``total_steps``, ``ce``, ``srp``, ``misses``, ``tokens_per_s`` and
    ``remaining_s`` (of training); what is not known yet is null.

    Args:
        run_dir: the folder of the run.
        interval: seconds between two writes.
    """

    def __init__(self, run_dir: Path, interval: float = 2.0) -> None:
        self.run_dir = run_dir
        self.interval = interval
        self.seconds = 0.0
        self._earlier_seconds = 0.0
        self._began = time.monotonic()
        self._tokens: Tensor | int = 0
        self._written = 0.0
        self._batch_began = 0.0
        self._steps_before = 0
        self._saved = False
        self._signal: int | None = None
        self._signalled = 0.0
        self._handlers: dict[int, Any] = {}

    @property
    def tokens(self) -> int:
        """Real tokens that all processes have trained on."""
        return int(self._tokens)

    @property
    def tokens_per_second(self) -> float:
        """Training throughput; validation and set-up do not count."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def wall_seconds(self) -> float:
        """Of all sessions, with set-up and validation; those before this one up to their last checkpoint."""
        return self._earlier_seconds + time.monotonic() - self._began

    @property
    def checkpoint(self) -> Path:
        """What a resumed run goes on from."""
        return self.run_dir / "checkpoints" / "last.ckpt"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals, SIGTERM from Lightning, which would stop between two batches and save nothing."""
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._heed) for number in SIGNALS}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, say that training has ended, and give the signals back."""
        trainer.save_checkpoint(self.checkpoint)
        self._write(trainer, "train", at_once=True)
        if self._stops(trainer):
            self._interrupt(trainer)
        self._give_back()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the signals back."""
        self._give_back()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Stop if the step before was the last, which is logged by now; else start the clock."""
        if self._saved:
            self._interrupt(trainer)
        self._steps_before = trainer.global_step
        self._batch_began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch, write now and then, and save if a signal came and a step is done: gradients are not kept."""
        self.seconds += time.perf_counter() - self._batch_began
        self._tokens = self._tokens + RoutingSession.of(pl_module).count_tokens(batch) * trainer.world_size
        self._write(trainer, "train")
        if trainer.global_step > self._steps_before and self._stops(trainer):
            trainer.save_checkpoint(self.checkpoint)
            self._saved = True

    def on_validation_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        """Write now and then."""
        self._write(trainer, "validate")

    def state_dict(self) -> dict[str, Any]:
        """Tokens and seconds so far."""
        return {"tokens": self.tokens, "seconds": self.seconds, "wall_seconds": self.wall_seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._tokens, self.seconds = state_dict["tokens"], state_dict["seconds"]
        self._earlier_seconds = state_dict.get("wall_seconds", self.seconds)  # older checkpoints have none

    def _heed(self, number: int, *_: Any) -> None:
        now = time.monotonic()
        if self._signal is None:
            self._signal, self._signalled = number, now
            print(f"\n{SIGNALS[number]}: saving after this step; once more to stop at once", file=sys.stderr)
        elif number != signal.SIGTERM or now - self._signalled > SAME_SECONDS:
            self._give_back()
            raise _stop(terminated=number == signal.SIGTERM)

    def _stops(self, trainer: Trainer) -> bool:
        return _anywhere(trainer, self._signal is not None)

    def _interrupt(self, trainer: Trainer) -> None:
        self._give_back()
        if trainer.is_global_zero:
            print(f"\nsaved step {trainer.global_step} of {trainer.max_steps} in {self.checkpoint}", file=sys.stderr)
        raise _stop(terminated=_anywhere(trainer, self._signal == signal.SIGTERM))

    def _give_back(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _write(self, trainer: Trainer, phase: str, *, at_once: bool = False) -> None:
        now = time.monotonic()
        if not trainer.is_global_zero or (now - self._written < self.interval and not at_once):
            return
        self._written = now
        step, total = trainer.global_step, total_steps(trainer)
        cross_entropy, routing = trainer.callback_metrics.get("train/ce"), current_routing(trainer)
        left = (total - step) * self.seconds / step if step else math.inf
        write_json(
            self.run_dir / "progress.json",
            {
                "phase": phase,
                "step": step,
                "total_steps": trainer.max_steps,
                "ce": None if cross_entropy is None else float(cross_entropy),
                "srp": routing.get("SRP"),
                "misses": routing.get("misses"),
                "tokens_per_s": self.tokens_per_second,
                "remaining_s": left if math.isfinite(left) else None,
            },
        )


def _anywhere(trainer: Trainer, here: bool) -> bool:
    return here if trainer.world_size == 1 else trainer.strategy.reduce_boolean_decision(here, all=False)


def _stop(*, terminated: bool) -> BaseException:
    return SIGTERMException(TERMINATED) if terminated else KeyboardInterrupt()


class StepCheckpoint(ModelCheckpoint):
    """Saves after whole steps alone: resumed from a step that it saves at, its parent saves within the next."""

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Remember the step."""
        self._steps_before = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Save if a step is done."""
        if trainer.global_step > self._steps_before:
            super().on_train_batch_end(trainer, *args, **kwargs)
