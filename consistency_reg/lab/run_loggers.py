"""The loggers of a run, and what they get at its end."""

import csv
import io
import secrets
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

from consistency_reg.callbacks.loggers import TrainerBoard, log_files, wandb_loggers
from consistency_reg.lab.files import naming, write_atomically
from consistency_reg.lab.run_folder import RunFolder
from consistency_reg.lab.wandb_login import wandb_mode
from consistency_reg.optional import require

FLUSH_SECONDS = 1.0


class MetricsFile(Logger):
    """Writes every logged row to a CSV at once: a killed process loses none that it has logged.

    The file is that of Lightning's CSVLogger, sorted columns with ``step`` among them; but a new column, for which the
    file has to be written anew, never leaves a part of it.

    Args:
        path: of the file, which is begun anew.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._columns: list[str] = []

    @property
    def name(self) -> str:
        """Return "", as the logger has no name."""
        return ""

    @property
    def version(self) -> str:
        """Return "", as the logger has no version."""
        return ""

    @property
    def save_dir(self) -> str:
        """Return the folder of the file."""
        return str(self.path.parent)

    @property
    def log_dir(self) -> str:
        """Return the folder of the file."""
        return self.save_dir

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Write nothing: the recipe is in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Write a row.

        Args:
            metrics: column -> value.
            step: of the row.

        Raises:
            OSError: it cannot be written; names the folder.
        """
        row = {name: value.item() if isinstance(value, Tensor) else value for name, value in metrics.items()}
        row["step"] = step
        if new := row.keys() - set(self._columns):
            before = self._rows()
            self._columns = sorted({*self._columns, *new})
            write_atomically(self.path, self._csv([dict(zip(self._columns, self._columns, strict=True)), *before, row]))
        else:
            with naming(self.path), self.path.open("a", newline="") as file:
                file.write(self._csv([row]))

    def _rows(self) -> list[dict[str, str]]:
        if not self._columns:
            return []
        with self.path.open(newline="") as file:
            return list(csv.DictReader(file))

    def _csv(self, rows: Sequence[Mapping[str, Any]]) -> str:
        text = io.StringIO(newline="")
        csv.DictWriter(text, self._columns).writerows(rows)
        return text.getvalue()


def run_loggers(folder: RunFolder, wandb_project: str) -> list[Logger]:
    """Return the loggers of a run: ``metrics.csv``, and wandb unless the project is empty.

    wandb is offline where there is no login. A resumed run has the wandb id that it began with, and what it logged
    before stays as ``metrics-1.csv`` and so on.
    """
    if is_first_process():
        folder.set_metrics_aside()
    metrics = MetricsFile(folder.metrics)
    if not wandb_project:
        return [metrics]
    wandb_logger = WandbLogger(
        name=folder.name,
        project=wandb_project,
        id=folder.wandb_id(secrets.token_hex(4)) if is_first_process() else None,  # the others do not speak to wandb
        save_dir=folder.path.absolute(),  # wandb's process may have begun in another folder
        mode=wandb_mode(),
        settings=_settings(),
    )
    return [metrics, wandb_logger]


def is_first_process() -> bool:
    """Return whether this is the process that writes; known before the trainer is built."""
    return getattr(rank_zero_only, "rank", 0) == 0


def log_result(trainer: Trainer, result: Mapping[str, Any], name: str, files: Sequence[Path]) -> None:
    """Log ``result.json`` into wandb's summary, and the files of the model card as an artifact.

    The recipe is in wandb's config and the metrics are in the summary under their own names, so neither is repeated.
    """
    shown = {key: value for key, value in result.items() if key not in ("config", "metrics")}
    TrainerBoard(trainer).summary({"result": shown})
    log_files(trainer, f"{name}-card", "model-card", files)


def finish(trainer: Trainer, *, failed: bool) -> None:
    """End wandb's run, so that the next in this process does not join it."""
    if trainer.is_global_zero:
        for logger in wandb_loggers(trainer):
            logger.experiment.finish(exit_code=int(failed))


def _settings() -> Any:
    """Return wandb's settings: what is logged is in the file within a second, not 15, should the run be killed."""
    with require("wandb"):
        import wandb
    often = "x_transaction_log_flush_interval"
    known: dict[str, Any] = {often: FLUSH_SECONDS} if often in wandb.Settings.model_fields else {}
    return wandb.Settings(**known)
