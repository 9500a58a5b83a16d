"""Read tokens and domains from a batch and a trainer."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from consistency_reg.optional import require

with require("lightning"):
    from lightning.pytorch import Trainer


def token_ids(batch: Any) -> Tensor | None:
    """Return the [B, T] token ids of a batch; None where it has none.

    They are under ``input_ids`` of a mapping, first in a sequence, or the batch itself.

    Example:
        >>> import torch
        >>> token_ids((torch.tensor([[3, 1, 2]]), "anything")).shape
        torch.Size([1, 3])
    """
    if isinstance(batch, Mapping):
        ids = batch.get("input_ids")
    else:
        ids = batch[0] if isinstance(batch, tuple | list) and batch else batch
    is_ids = isinstance(ids, Tensor) and ids.dim() == 2 and not (ids.is_floating_point() or ids.is_complex())
    return ids if is_ids else None


def count_tokens(batch: Any, valid: Tensor | None) -> Tensor | int:
    """Return the number of real tokens of a batch, on its device so that no host waits; 0 where it cannot be told."""
    if valid is not None:
        return valid.sum()
    ids = token_ids(batch)
    return 0 if ids is None else ids.numel()


def domain_names(trainer: Trainer) -> list[str]:
    """Return a name for each validation loader: the data module's ``domains`` if they are as many, else numbers."""
    loaders = len(trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches)
    names = getattr(getattr(trainer, "datamodule", None), "domains", None) or []
    return list(names) if len(names) == loaders else [str(index) for index in range(loaders)]
