"""Show tables, pictures and alerts in the loggers of a Lightning trainer: wandb, and TensorBoard for pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from consistency_reg.optional import require
from consistency_reg.tracking.artifacts import log_artifact
from consistency_reg.tracking.board import Board, Boards, Table, TensorBoardBoard, WandbBoard
from consistency_reg.tracking.board import define_axes as define_wandb_axes

with require("lightning"):
    from lightning.pytorch import Trainer
    from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
    from lightning.pytorch.utilities.rank_zero import rank_zero_warn


class TrainerBoard(Board):
    """Shows in every logger of a trainer what that logger can hold, at the present step.

    Numbers go to all of them, images to wandb and TensorBoard, the rest to wandb.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    @property
    def shows_pictures(self) -> bool:
        """Return whether a logger can hold pictures."""
        return any(isinstance(logger, WandbLogger | TensorBoardLogger) for logger in self.trainer.loggers)

    def scalars(self, values: Mapping[str, float]) -> None:
        """Log numbers to every logger."""
        for logger in self.trainer.loggers:
            logger.log_metrics(dict(values), logged_step(self.trainer))

    def media(self, images: Mapping[str, Any], tables: Mapping[str, Table]) -> None:
        """Show images and tables: one row in wandb."""
        self._boards().media(images, tables)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Write into the summary of wandb runs, next to the last values that wandb keeps there by itself."""
        self._boards().summary(values)

    def alert(self, title: str, text: str) -> None:
        """Alert the owner of wandb runs."""
        self._boards().alert(title, text)

    def warn(self, text: str) -> None:
        """Warn on the terminal of the first process."""
        rank_zero_warn(text, stacklevel=3)

    def _boards(self) -> Boards:
        """Return the loggers that hold more than numbers; none on other processes than the first."""
        if not self.trainer.is_global_zero:
            return Boards([])
        step = logged_step(self.trainer)
        boards: list[Board] = []
        for logger in self.trainer.loggers:
            if isinstance(logger, WandbLogger):
                boards.append(WandbBoard(logger.experiment, _row_at(logger, step)))
            elif isinstance(logger, TensorBoardLogger):
                boards.append(TensorBoardBoard(logger.experiment, step))
        return Boards(boards)


def define_axes(trainer: Trainer) -> None:
    """Tell the trainer's wandb runs that everything is over its step, and that the tokens seen are an axis too."""
    for logger in wandb_loggers(trainer):
        define_wandb_axes(logger.experiment)


def logged_step(trainer: Trainer) -> int:
    """Return the step under which Lightning logs now: not ``global_step`` in a validation within ``fit``."""
    return int(getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", trainer.global_step))


def wandb_loggers(trainer: Trainer) -> list[WandbLogger]:
    """Return those of the loggers that are wandb's."""
    return [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]


def log_settings(trainer: Trainer, name: str, settings: Mapping[str, Any]) -> None:
    """Put settings into the config of every logger's run under a name, if wandb's config does not have it already."""
    for logger in trainer.loggers:
        has_them = isinstance(logger, WandbLogger) and trainer.is_global_zero and name in logger.experiment.config
        if not has_them:
            logger.log_hyperparams({name: dict(settings)})


def log_files(trainer: Trainer, name: str, kind: str, paths: Sequence[Path]) -> None:
    """Log files as one artifact of wandb."""
    if trainer.is_global_zero:
        for logger in wandb_loggers(trainer):
            log_artifact(logger.experiment, name, kind, paths)


def _row_at(logger: WandbLogger, step: int) -> Any:
    return lambda row: logger.log_metrics(row, step)
