"""The checks of expert ids and masks that come from users: each names the argument, what was expected and what came."""

import torch
from torch import Tensor

from consistency_reg.routing.documents import row_chunks

CHECKED_TOKENS = 2**16  # at a time: bounds the memory of a check


def check_masks(shape: tuple[int, int], valid: Tensor | None, document_ids: Tensor | None) -> None:
    """Raise if ``valid`` is not bool [B, T] or ``document_ids`` is not integer [B, T]."""
    if valid is not None:
        if valid.dtype != torch.bool:
            raise TypeError(f"valid must be a bool tensor, True for real tokens, got {valid.dtype}")
        if valid.shape != shape:
            raise ValueError(f"valid must have shape [B, T] = {list(shape)}, got {list(valid.shape)}")
    if document_ids is not None:
        if document_ids.is_floating_point() or document_ids.dtype == torch.bool:
            raise TypeError(f"document_ids must be an integer tensor, got {document_ids.dtype}")
        if document_ids.shape != shape:
            raise ValueError(f"document_ids must have shape [B, T] = {list(shape)}, got {list(document_ids.shape)}")


def check_id_shape(expert_ids: Tensor, num_experts: int, name: str = "expert_ids") -> None:
    """Raise if ``expert_ids`` is not int64 [B, T, K] with 1 <= K <= E. Reads no values: no wait for a GPU."""
    if expert_ids.dtype != torch.int64:  # that of a NumPy array is none of torch's
        kind = type(expert_ids).__name__
        raise TypeError(f"{name} must be an int64 tensor, got a {kind} of {expert_ids.dtype}")
    if expert_ids.dim() != 3:
        raise ValueError(f"{name} must have shape [B, T, K], got {list(expert_ids.shape)}")
    if not 1 <= expert_ids.shape[-1] <= num_experts:
        raise ValueError(
            f"{name} must have between 1 and num_experts={num_experts} experts per token, got K={expert_ids.shape[-1]}"
        )


def check_expert_ids(
    expert_ids: Tensor, num_experts: int, valid: Tensor | None = None, *, name: str = "expert_ids"
) -> None:
    """Raise if the ids of a valid token are out of range or repeated. Reads the data."""
    check_id_shape(expert_ids, num_experts, name)
    before = 0
    for rows in row_chunks(len(expert_ids), expert_ids.shape[1], CHECKED_TOKENS):
        ids_NK = expert_ids[rows].flatten(0, 1) if valid is None else expert_ids[rows][valid[rows]]
        if ids_NK.numel():
            _check_tokens(ids_NK, num_experts, name, before)
        before += len(ids_NK)


def _check_tokens(ids_NK: Tensor, num_experts: int, name: str, before: int) -> None:
    low, high = (int(bound) for bound in ids_NK.aminmax())
    if low < 0 or high >= num_experts:
        raise ValueError(
            f"{name} must lie in 0..{num_experts - 1} (num_experts={num_experts}), got ids from {low} to {high}"
        )
    repeated_N = _repeats_an_expert(ids_NK)
    if bool(repeated_N.any()):
        first = int(repeated_N.nonzero()[0])
        found = f"{ids_NK[first].tolist()} (valid token {before + first})"
        raise ValueError(f"{name} must not repeat an expert within a token, got {found}")


def _repeats_an_expert(ids_NK: Tensor) -> Tensor:
    """Return whether a token names an expert twice: [N, K] -> [N] bool. Comparing pairs is faster than sorting."""
    if ids_NK.shape[1] > 16:
        ordered_NK = ids_NK.sort(dim=-1).values
        return (ordered_NK[:, 1:] == ordered_NK[:, :-1]).any(dim=-1)
    columns = ids_NK.T.to(torch.int32, memory_format=torch.contiguous_format).unbind(0)
    repeated_N = torch.zeros_like(columns[0], dtype=torch.bool)
    for i, one in enumerate(columns):
        for other in columns[:i]:
            repeated_N |= one == other
    return repeated_N
