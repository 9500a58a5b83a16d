"""Tables and pictures to the loggers of a trainer that can hold them: wandb, and TensorBoard for pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from consistency_reg.optional import require
from consistency_reg.tracking.artifacts import log_artifact

with require("lightning"):
    from lightning.pytorch import Trainer
    from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
    from lightning.pytorch.utilities.rank_zero import rank_zero_warn

STEP, TOKENS = "trainer/global_step", "trainer/tokens"  # the first is what Lightning's WandbLogger calls it


@dataclass(frozen=True)
class Table:
    """A table with a header."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


def define_axes(trainer: Trainer) -> None:
    """Tell wandb that everything is over the trainer's step, and that the tokens seen are an axis too.

    wandb's own step counts the calls of ``log`` and goes on where a run is resumed, so that nothing is dropped; these
    are the axes to read curves by.
    """
    for logger in wandb_loggers(trainer):
        run = logger.experiment
        run.define_metric(STEP)
        run.define_metric(TOKENS)
        run.define_metric("*", step_metric=STEP, step_sync=True)


def logged_step(trainer: Trainer) -> int:
    """The step under which Lightning logs now, which is not ``global_step`` in a validation within ``fit``."""
    return int(getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", trainer.global_step))


def wandb_loggers(trainer: Trainer) -> list[WandbLogger]:
    """Those of the loggers that are wandb's."""
    return [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]


def shows_pictures(trainer: Trainer) -> bool:
    """Whether a logger can hold pictures, and there is what draws them; a warning if only that is missing."""
    if not any(isinstance(logger, WandbLogger | TensorBoardLogger) for logger in trainer.loggers):
        return False
    try:
        import consistency_reg.tracking.figures  # noqa: F401
    except ImportError as error:
        rank_zero_warn(f"RoutingMonitor draws no pictures: {error}")
        return False
    return True


def log_pictures(trainer: Trainer, figures: Mapping[str, Any], tables: Mapping[str, Table]) -> None:
    """Log figures of matplotlib, and tables, at the present step: one row in wandb.

    Nothing happens on other processes than the first.
    """
    if not trainer.is_global_zero:
        return
    from consistency_reg.tracking.figures import pixels

    step = logged_step(trainer)
    images = {key: pixels(figure) for key, figure in figures.items()}
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            with require("wandb"):
                import wandb
            row: dict[str, Any] = {key: wandb.Image(image) for key, image in images.items()}
            row |= {key: wandb.Table(list(t.columns), [list(r) for r in t.rows]) for key, t in tables.items()}
            logger.log_metrics(row, step)
        elif isinstance(logger, TensorBoardLogger):
            for key, image in images.items():
                logger.experiment.add_image(key, image, step, dataformats="HWC")


def log_scalars(trainer: Trainer, values: Mapping[str, float]) -> None:
    """Log numbers at the present step to every logger."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), logged_step(trainer))


def summarize(trainer: Trainer, values: Mapping[str, Any]) -> None:
    """Write into the summary of wandb runs, beside the last value of everything that wandb keeps there by itself."""
    if trainer.is_global_zero:
        for logger in wandb_loggers(trainer):
            logger.experiment.summary.update(dict(values))


def log_files(trainer: Trainer, name: str, kind: str, paths: Sequence[Path]) -> None:
    """Log files as one artifact of wandb."""
    if trainer.is_global_zero:
        for logger in wandb_loggers(trainer):
            log_artifact(logger.experiment, name, kind, paths)
