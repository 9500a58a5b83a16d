"""The agreement of two models on the experts of the same tokens."""

import torch
from torch import Tensor

from consistency_reg.functional.balance import Mean
from consistency_reg.routing import check_masks


def expert_agreement(expert_ids: Tensor, other_ids: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return the share of a token's experts that another model, or the same before fine-tuning, chooses for it too.

    ``sum_t |S_t & S'_t| / (K * tokens)`` over the valid tokens; the order within a set does not count.

    Args:
        expert_ids: [B, T, K] integers, the S of each token.
        other_ids: [B, T, K] integers, the S' of the same tokens.
        valid: [B, T] bool, True for real tokens; all when None.

    Returns:
        A float64 scalar in 0..1; 0 without a real token.

    Raises:
        ValueError: shapes that do not fit together.

    Example:
        >>> float(expert_agreement(torch.tensor([[[0, 1], [2, 3]]]), torch.tensor([[[1, 0], [2, 5]]])))
        0.75
    """
    return agreement_mean(expert_ids, other_ids, valid).value


def agreement_mean(expert_ids: Tensor, other_ids: Tensor, valid: Tensor | None = None) -> Mean:
    """Return :func:`expert_agreement` as integers that add up over batches. The host waits for no device."""
    if expert_ids.dim() != 3 or other_ids.shape != expert_ids.shape:
        raise ValueError(
            "expert_ids and other_ids must have the same shape [B, T, K], "
            f"got {list(expert_ids.shape)} and {list(other_ids.shape)}"
        )
    B, T, K = expert_ids.shape
    check_masks((B, T), valid, None)
    shared_BT = (expert_ids[..., :, None] == other_ids[..., None, :]).sum(dim=(-2, -1))
    if valid is None:
        return Mean(shared_BT.sum(), torch.tensor(shared_BT.numel() * K, device=expert_ids.device))
    return Mean(shared_BT.where(valid, 0).sum(), K * valid.sum())
