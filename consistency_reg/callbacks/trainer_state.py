"""Read domains from a trainer."""

from consistency_reg.optional import require

with require("lightning"):
    from lightning.pytorch import Trainer


def domain_names(trainer: Trainer) -> list[str]:
    """Return the names of validation or test loaders: the data module's ``domains``, if one for each, or numbers."""
    if trainer.testing:
        loaders = len(trainer.num_test_batches)
    else:
        loaders = len(trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches)
    names = getattr(getattr(trainer, "datamodule", None), "domains", None) or []
    return list(names) if len(names) == loaders else [str(index) for index in range(loaders)]
