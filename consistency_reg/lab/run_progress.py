"""The progress of a run: ``progress.json`` in its folder, its throughput, and how Ctrl-C and SIGTERM end it."""

import math
import signal
import sys
import threading
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from consistency_reg.callbacks.progress import current_routing
from consistency_reg.callbacks.trainer_state import total_steps
from consistency_reg.lab.checkpoint_files import WholeCheckpoints
from consistency_reg.lab.cli import TERMINATED
from consistency_reg.lab.files import write_atomically
from consistency_reg.lab.run_folder import RunFolder
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
        folder: of the run.
        files: through which the trainer saves.
        interval: seconds between two writes.
    """

    def __init__(self, folder: RunFolder, files: WholeCheckpoints, interval: float = 2.0) -> None:
        self.folder = folder
        self.files = files
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
        """Return the real tokens that all processes have trained on."""
        return int(self._tokens)

    @property
    def tokens_per_second(self) -> float:
        """Return the throughput of training; validation and set-up do not count."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def wall_seconds(self) -> float:
        """Return the seconds of all sessions, with set-up and validation; of earlier ones up to the last checkpoint."""
        return self._earlier_seconds + time.monotonic() - self._began

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals, SIGTERM from Lightning, which would stop between two batches and save nothing.

        Warn if the epochs end before ``max_steps``, for which the learning rate is scheduled.
        """
        if (steps := total_steps(trainer)) < trainer.max_steps:
            rank_zero_warn(
                f"the data end this run after {steps:g} of trainer.max_steps={trainer.max_steps} steps: raise "
                f"trainer.max_epochs={trainer.max_epochs}, or set it to -1 to go through them as often as it takes"
            )
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._heed) for number in SIGNALS}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write that training has ended, and restore the handlers of signals."""
        if not self._saved:
            trainer.save_checkpoint(self.folder.last_checkpoint)
        self.files.release()
        self._write(trainer, "train", at_once=True)
        if self._stops(trainer):
            self._interrupt(trainer)
        self._give_back()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the handlers of signals."""
        self._give_back()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Stop if the step before was the last, which is logged by now; else start the clock."""
        if self._saved:
            self.files.release()
            self._interrupt(trainer)
        self._steps_before = trainer.global_step
        self._batch_began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch, write now and then, and save where a signal came or the last step is done.

        Not within a step, as gradients are not kept, and not when training has ended: Lightning takes the epoch for
        complete then, and a run that is made longer could not resume in it.
        """
        self.seconds += time.perf_counter() - self._batch_began
        self._tokens = self._tokens + RoutingSession.of(pl_module).count_tokens(batch) * trainer.world_size
        self._write(trainer, "train")
        is_last = 0 <= trainer.max_steps <= trainer.global_step
        if trainer.global_step > self._steps_before and (self._stops(trainer) or is_last):
            with self.files.held():
                trainer.save_checkpoint(self.folder.last_checkpoint)
            self._saved = True

    def on_validation_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        """Write now and then."""
        self._write(trainer, "validate")

    def state_dict(self) -> dict[str, Any]:
        """Return tokens and seconds so far."""
        return {"tokens": self.tokens, "seconds": self.seconds, "wall_seconds": self.wall_seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from :meth:`state_dict`."""
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
            where = self.folder.last_checkpoint
            print(f"\nsaved step {trainer.global_step} of {trainer.max_steps} in {where}", file=sys.stderr)
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
        self.folder.write_progress(
            {
                "phase": phase,
                "step": step,
                "total_steps": trainer.max_steps,
                "ce": None if cross_entropy is None else float(cross_entropy),
                "srp": routing.get("SRP"),
                "misses": routing.get("misses"),
                "tokens_per_s": self.tokens_per_second,
                "remaining_s": left if math.isfinite(left) else None,
            }
        )


def _anywhere(trainer: Trainer, here: bool) -> bool:
    return here if trainer.world_size == 1 else trainer.strategy.reduce_boolean_decision(here, all=False)


def _stop(*, terminated: bool) -> BaseException:
    return SIGTERMException(TERMINATED) if terminated else KeyboardInterrupt()


class StepCheckpoint(ModelCheckpoint):
    """Saves after whole steps, and lets a checkpoint take its place when its step is logged.

    A checkpoint also waits for the validation that follows its step: resumed from it, Lightning would leave that out.
    ``last.ckpt`` is always the newest. Resumed from a step that it saves at, Lightning's own saves within the next.

    Args:
        folder: of the run.
        files: through which the trainer saves.
        every: optimizer steps between two checkpoints.
        keep: how many of the newest stay, as ``step=00000050.ckpt``, next to ``last.ckpt``.

    Raises:
        ValueError: ``every`` or ``keep`` is out of range.
    """

    def __init__(self, folder: RunFolder, files: WholeCheckpoints, every: int, keep: int = 0) -> None:
        check_checkpoints(every, keep)
        super().__init__(
            folder.checkpoints,
            save_last=True,
            save_top_k=0,
            every_n_train_steps=every,
            enable_version_counter=False,  # always last.ckpt, which a resumed run looks for
        )
        self.files = files
        self.keep = keep

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        """Move the checkpoint of the step before to its place, and note the step."""
        self._release(trainer)
        self._steps_before = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Save if a step is done."""
        if trainer.global_step > self._steps_before:
            with self.files.held():
                super().on_train_batch_end(trainer, *args, **kwargs)

    def on_train_epoch_end(self, trainer: Trainer, *args: Any) -> None:
        """Move the checkpoint of the epoch's last step to its place."""
        self._release(trainer)
        super().on_train_epoch_end(trainer, *args)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the end of training to :class:`RunProgress`, which saved it before its epoch counted as complete."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove a checkpoint whose step or validation may not have been logged, as a resumed run would not log it."""
        batches = trainer.fit_loop.epoch_loop.batch_progress.current
        is_logged = batches.completed == batches.processed  # type: ignore[attr-defined]
        if isinstance(exception, OSError) or trainer.validating or not is_logged:
            self.files.discard()
        self._release(trainer)
        super().on_exception(trainer, pl_module, exception)

    def _release(self, trainer: Trainer) -> None:
        for path in self.files.release():
            if self.keep and trainer.is_global_zero:
                kept = path.with_name(f"step={trainer.global_step:08d}{path.suffix}")
                kept.unlink(missing_ok=True)
                try:
                    kept.hardlink_to(path)
                except OSError:  # a file system without links
                    write_atomically(kept, path.read_bytes())
                for old in sorted(path.parent.glob("step=*.ckpt"))[: -self.keep]:
                    old.unlink(missing_ok=True)


def check_checkpoints(every: int, keep: int) -> None:
    """Raise ValueError if checkpoints cannot be saved so often, or so many kept."""
    if every < 1:
        raise ValueError(f"checkpoint_every must be at least 1, got {every}")
    if keep < 0:
        raise ValueError(f"keep_checkpoints must be at least 0, got {keep}")
