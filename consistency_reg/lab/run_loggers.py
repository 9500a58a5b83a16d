"""What tracks a run: its loggers, and what they get at its end."""

import secrets
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from consistency_reg.callbacks.loggers import log_files, summarize, wandb_loggers
from consistency_reg.lab.files import write_atomically
from consistency_reg.lab.wandb_login import wandb_mode
from consistency_reg.optional import require

FLUSH_SECONDS = 1.0


def run_loggers(run_dir: Path, wandb_project: str) -> list[Logger]:
    """metrics.csv in the folder, and wandb unless the project is empty; offline where there is no login.

    A run that goes on has the wandb id that it began with. CSVLogger begins its file anew, so what an interrupted run
    wrote stays as metrics-1.csv and so on.
    """
    if not wandb_project:
        return [_csv_logger(run_dir)]
    wandb_logger = WandbLogger(
        name=run_dir.resolve().name,
        project=wandb_project,
        id=_wandb_id(run_dir),
        save_dir=run_dir.absolute(),  # wandb's process may have begun in another folder
        mode=wandb_mode(),
        settings=_settings(),
    )
    return [_csv_logger(run_dir), wandb_logger]


def is_first_process() -> bool:
    """Whether this is the process that writes; known before the trainer is built."""
    return getattr(rank_zero_only, "rank", 0) == 0


def log_result(trainer: Trainer, result: Mapping[str, Any], name: str, files: Sequence[Path]) -> None:
    """What ``result.json`` holds into wandb's summary, and the files of the model card as an artifact.

    The recipe is in wandb's config and the metrics are in the summary under their own names, so neither is repeated.
    """
    summarize(trainer, {"result": {key: value for key, value in result.items() if key not in ("config", "metrics")}})
    log_files(trainer, f"{name}-card", "model-card", files)


def finish(trainer: Trainer, *, failed: bool) -> None:
    """End wandb's run, so that the next in this process does not join it."""
    if trainer.is_global_zero:
        for logger in wandb_loggers(trainer):
            logger.experiment.finish(exit_code=int(failed))


def _settings() -> Any:
    """wandb's settings: what is logged goes to the file within a second, not 15, should the machine or we be killed."""
    with require("wandb"):
        import wandb
    often = "x_transaction_log_flush_interval"
    known: dict[str, Any] = {often: FLUSH_SECONDS} if often in wandb.Settings.model_fields else {}
    return wandb.Settings(**known)


def _wandb_id(run_dir: Path) -> str | None:
    """The id that the run began with; None in other processes than the first, which do not speak to wandb."""
    if not is_first_process():
        return None
    path = run_dir / "wandb-id"
    if not path.exists() or not path.stat().st_size:
        write_atomically(path, secrets.token_hex(4))
    return path.read_text()


def _csv_logger(run_dir: Path) -> CSVLogger:
    if is_first_process() and (metrics := run_dir / "metrics.csv").exists():
        metrics.rename(run_dir / f"metrics-{len(list(run_dir.glob('metrics-*.csv'))) + 1}.csv")
    logger = CSVLogger(run_dir, name="", version="", flush_logs_every_n_steps=1)  # a killed run has written all it saw
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Experiment logs directory")
        _ = logger.experiment  # warns that it deletes earlier files, which are out of its way
    return logger
