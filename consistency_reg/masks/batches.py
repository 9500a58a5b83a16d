"""Read the tokens of a batch, or of the call of a model, by the names that trainers give them."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

Masks = tuple[Tensor | None, Tensor | None]
Shape = tuple[int, int]

TOKENS = ("input_ids", "inputs_embeds")
CUMULATIVE = ("cu_seq_lens_q", "cu_seqlens_q", "cu_seqlens", "cu_seq_lens", "cu_seq_lens_k", "cu_seqlens_k")
BOUNDARIES = ("document_ids", "seq_idx", *CUMULATIVE, "position_ids")
DESCRIBES_TOKENS = ("attention_mask", *BOUNDARIES)
LABELS = ("labels", "shift_labels")
KEYS = (*TOKENS, *DESCRIBES_TOKENS, *LABELS, "past_key_values")


def given_by(batch: Any) -> dict[str, Any]:
    """Return what a batch holds by name: a mapping, a named tuple, or an object with attributes."""
    if not isinstance(batch, Mapping):
        batch = batch._asdict() if hasattr(batch, "_asdict") else getattr(batch, "__dict__", {})
    return {name: value for name, value in batch.items() if value is not None and isinstance(name, str)}


def named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a module's forward by name, without those that are None.

    Example:
        >>> named_arguments(nn.Linear(2, 2), (1,), {})
        {'input': 1}
    """
    names = inspect.signature(module.forward).parameters if args else ()  # a signature takes as long as a small layer
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    return {name: value for name, value in given.items() if value is not None}


def token_shape(given: Mapping[str, Any]) -> Shape:
    """Return (B, T) of the tokens that a batch or a call holds; ValueError where nothing tells."""
    for name in (*TOKENS, "labels", "document_ids", "seq_idx", "attention_mask", "position_ids"):
        value = given.get(name)
        if isinstance(value, Tensor) and value.dim() >= 2:
            if name in ("attention_mask", "position_ids") and value.dim() > 2:
                B, T = (value.shape[0], value.shape[-1]) if name == "attention_mask" else value.shape[-2:]
            else:
                B, T = value.shape[:2]
            return int(B), int(T)
    raise ValueError(f"the shape [B, T] of the tokens cannot be told from {sorted(given)}: give masks=")


def has_tokens(given: Mapping[str, Any]) -> bool:
    """Return whether ``given`` holds tokens, as ids or embedded."""
    return any(isinstance(given.get(name), Tensor) and given[name].dim() >= 2 for name in TOKENS)


def token_ids(batch: Any) -> Tensor | None:
    """Return the [B, T] token ids of a batch: ``input_ids`` of a mapping, the first of a sequence, or the batch itself.

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


def misshapen(name: str, value: Any, shape: Shape) -> ValueError:
    """Return the error for a value that does not describe [B, T] tokens."""
    got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    return ValueError(
        f"{name} must describe tokens of shape [B, T] = {list(shape)}, got {got}: give masks=, a function that returns "
        "(valid, document_ids) of the tokens that the routers saw"
    )
