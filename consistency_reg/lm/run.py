"""The folder of a run: how far it is (progress.json) and, once it is finished, what came out (result.json)."""

import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from consistency_reg.files import write_json as write_json
from consistency_reg.provenance import git_commit as git_commit
from consistency_reg.provenance import package_versions as package_versions


class RunProgress(Callback):
    """Keeps ``progress.json`` current and counts tokens and seconds of training, across interruptions.

    Args:
        run_dir: the folder of the run.
        interval: seconds between two writes.
    """

    def __init__(self, run_dir: Path, interval: float = 2.0) -> None:
        self.path = run_dir / "progress.json"
        self.interval = interval
        self.tokens = 0
        self.seconds = 0.0
        self._written = 0.0
        self._step_began = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Training throughput; validation and set-up do not count."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock of a step."""
        self._step_began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the step, and write now and then."""
        self.seconds += time.perf_counter() - self._step_began
        self.tokens += batch["input_ids"].numel() * trainer.world_size
        self._write(trainer, "train")

    def on_validation_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        """Write now and then."""
        self._write(trainer, "validate")

    def state_dict(self) -> dict[str, Any]:
        """Tokens and seconds so far."""
        return {"tokens": self.tokens, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.tokens, self.seconds = state_dict["tokens"], state_dict["seconds"]

    def _write(self, trainer: Trainer, phase: str) -> None:
        now = time.monotonic()
        if not trainer.is_global_zero or now - self._written < self.interval:
            return
        self._written = now
        cross_entropy = trainer.callback_metrics.get("train/ce")
        write_json(
            self.path,
            {
                "phase": phase,
                "step": trainer.global_step,
                "total_steps": trainer.max_steps if trainer.max_steps > 0 else trainer.estimated_stepping_batches,
                "ce": None if cross_entropy is None else float(cross_entropy),
                "tokens_per_s": self.tokens_per_second,
            },
        )
