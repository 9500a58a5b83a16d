"""Read a Lightning trainer: the names of its loaders, and its callbacks of a kind."""

from typing import TypeVar

from consistency_reg.optional import require

with require("lightning"):
    from lightning.pytorch import Callback, Trainer

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
