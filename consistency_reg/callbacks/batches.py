"""What the callbacks read from a batch and a trainer."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from consistency_reg.optional import require

with require("lightning"):
    from lightning.pytorch import Trainer

Masks = tuple[Tensor | None, Tensor | None]


def batch_masks(batch: Any) -> Masks:
    """(valid, document_ids) of a batch, both [B, T] or None.

    From a mapping with the usual keys: ``attention_mask`` (0/1 or bool, [B, T]) says which tokens are real, and
    ``document_ids`` or else ``position_ids`` (a new document wherever they do not go on by one) where documents begin.

    Example:
        >>> import torch
        >>> valid, document_ids = batch_masks({"position_ids": torch.tensor([[0, 1, 2, 0, 1]])})
        >>> valid, document_ids
        (None, tensor([[0, 0, 0, 1, 1]]))
    """
    if not isinstance(batch, Mapping):
        return None, None
    valid, document_ids = batch.get("attention_mask"), batch.get("document_ids")
    if valid is not None:
        valid = valid.bool() if valid.dim() == 2 else None
    if document_ids is None and (positions := batch.get("position_ids")) is not None and positions.dim() == 2:
        begins = positions.new_zeros(positions.shape)
        begins[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
        document_ids = begins.cumsum(dim=1)
    return valid, document_ids


def domain_names(trainer: Trainer) -> list[str]:
    """The names of the validation loaders: the data module's ``domains`` if it has one for each, else their numbers."""
    loaders = len(trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches)
    names = getattr(getattr(trainer, "datamodule", None), "domains", None) or []
    return list(names) if len(names) == loaders else [str(index) for index in range(loaders)]
