"""The terms of CoSMoEs' block-wise loss (BlES): how many experts change, and how far the router's weights move.

Means divide by what was counted and are 0, with a graph, where there was nothing to count.

B rows, T tokens, E routed experts of the layer, K active per token, p the router's distribution.
"""

from torch import Tensor

from consistency_reg.functional.pairs import has_predecessor
from consistency_reg.functional.segments import active_experts


def replaced_experts(expert_ids: Tensor, num_experts: int, position: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many experts neighbours replace, ``floor(H / 2)``, and the accesses of tokens with a predecessor.

    ``H = sum |1[e in S_t] - 1[e in S_{t-1}]|`` over the experts and the adjacent tokens of a document. Two integers
    without a gradient, the second K times the pairs.

    Args:
        expert_ids: [B, T, K], anything on padding.
        num_experts: E.
        position: [B, T] index of each token in its document, -1 on padding.

    Example:
        >>> import torch
        >>> ids, position = torch.tensor([[[0, 1], [1, 2], [1, 2]]]), torch.tensor([[0, 1, 2]])
        >>> replaced, accesses = replaced_experts(ids, 3, position)
        >>> int(replaced), int(accesses)
        (1, 4)
    """
    active_BTE = active_experts(expert_ids, num_experts, position >= 0)
    paired_BT = has_predecessor(position, 1)
    changes = ((active_BTE[:, 1:] - active_BTE[:, :-1]).abs().sum(dim=-1) * paired_BT).sum()
    return changes // 2, paired_BT.sum() * expert_ids.shape[-1]


def mean_absolute_step(probability: Tensor, position: Tensor) -> Tensor:
    """Return ``sum ‖p_t - p_{t-1}‖₁`` over the adjacent tokens of a document by the number of valid tokens.

    Example:
        >>> import torch
        >>> mean_absolute_step(torch.eye(2)[None, [0, 0, 1, 1]], torch.tensor([[0, 1, 2, 3]]))
        tensor(0.5000)
    """
    step_BT = (probability[:, 1:] - probability[:, :-1]).abs().sum(dim=-1)
    return (step_BT * has_predecessor(position, 1)).sum() / (position >= 0).sum().clamp_min(1)
