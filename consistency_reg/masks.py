"""Which tokens of a batch are real and where its documents begin, read from the usual keys."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

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
        if len(positions) == 1 and (tokens := batch.get("input_ids", batch.get("inputs_embeds"))) is not None:
            document_ids = document_ids.expand(len(tokens), -1)  # models take one row of positions for all rows
    return valid, document_ids


def named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a module's forward by name, without those that are None.

    Example:
        >>> named_arguments(nn.Linear(2, 2), (1,), {})
        {'input': 1}
    """
    given = dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | dict(kwargs)
    return {name: value for name, value in given.items() if value is not None}
