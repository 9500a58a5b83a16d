"""Read a Lightning trainer: the names of its loaders, its callbacks of a kind, and how many steps it trains."""

import math
from typing import TypeVar

from consistency_reg.optional import require

with require("lightning"):
    from lightning.pytorch import Callback, Trainer
    from lightning.pytorch.utilities.rank_zero import rank_zero_warn

Kind = TypeVar("Kind", bound=Callback)


def domain_names(trainer: Trainer) -> list[str]:
    """Return the names of validation or test loaders: the data module's ``domains``, if one for each, or numbers."""
    if trainer.testing:
        loaders = len(trainer.num_test_batches)
    else:
        loaders = len(trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches)
    names = getattr(getattr(trainer, "datamodule", None), "domains", None) or []
    return list(names) if len(names) == loaders else [str(index) for index in range(loaders)]


def callbacks_of(trainer: Trainer, kind: type[Kind]) -> list[Kind]:
    """Return a trainer's callbacks of a kind, in their order."""
    every: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in every if isinstance(callback, kind)]


def total_steps(trainer: Trainer) -> int | float:
    """Return the optimizer steps of the whole training, inf if it has no end; for the time after training has begun."""
    steps = trainer.max_steps if trainer.max_steps > 0 else math.inf
    if trainer.max_epochs is not None and trainer.max_epochs > 0 and math.isfinite(trainer.num_training_batches):
        per_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        steps = min(steps, trainer.max_epochs * per_epoch)
    return steps


def warn_of_late_start(trainer: Trainer, what: str, start_step: int) -> None:
    """Warn if training ends before the optimizer step at which something begins; for the time after it has begun."""
    if start_step >= (steps := total_steps(trainer)):
        rank_zero_warn(
            f"{what} begins at step {start_step} and training ends after {steps:g}, so it has no effect: lower "
            "start_step, or train for more steps"
        )
