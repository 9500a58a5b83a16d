"""The terms of ReMoE's loss: reuse of the last token's experts, change between tokens, and working sets of windows.

Means divide by what was counted and are 0, with a graph, where there was nothing to count.

B rows, T tokens, E routed experts of the layer, K active per token, p the router's distribution, W window length.
"""

import torch
from torch import Tensor

from consistency_reg.functional.pairs import has_predecessor, masked_mean


def symmetric_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return ``(KL(p ‖ q) + KL(q ‖ p)) / 2`` over the last axis of two log-distributions.

    Example:
        >>> p = torch.tensor([0.8, 0.2]).log()
        >>> round(symmetric_kl(p, p.flip(0)).item(), 4)  # 0.6 * ln 4
        0.8318
    """
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(dim=-1) / 2


def mean_symmetric_kl(log_probability: Tensor, position: Tensor, distance: int) -> Tensor:
    """Return the mean :func:`symmetric_kl` of the pairs at ``distance``: [B, T, E] log p -> scalar."""
    later, earlier = log_probability[:, distance:], log_probability[:, :-distance]
    return masked_mean(symmetric_kl(later, earlier), has_predecessor(position, distance))


def reuse_mass(probability: Tensor, expert_ids: Tensor, position: Tensor) -> Tensor:
    """Return ``rho = mean_t 1/K * sum(p_t[e] for e of the set that t - 1 used)``; at most 1/K, no gradient to t - 1.

    Args:
        probability: [B, T, E].
        expert_ids: [B, T, K], anything on padding.
        position: [B, T] index of each token in its document, -1 on padding.

    Example:
        >>> probability = torch.tensor([[[0.5, 0.5], [0.9, 0.1]]])
        >>> reuse_mass(probability, torch.tensor([[[0], [0]]]), torch.tensor([[0, 1]]))
        tensor(0.9000)
    """
    counted = has_predecessor(position, 1)
    used_before = expert_ids[:, :-1].where(counted[:, :, None], 0)
    return masked_mean(probability[:, 1:].gather(-1, used_before).mean(dim=-1), counted)


def window_entropy(probability: Tensor, position: Tensor, window: int) -> Tensor:
    """Return the entropy in nats of the mean distribution of a window, averaged over whole windows: -> scalar.

    From [B, T, E]. Windows follow one another without overlap from the document's start; a shorter rest is left out.

    Example:
        >>> probability = torch.eye(2)[None, [0, 1, 1, 1]]
        >>> round(window_entropy(probability, torch.tensor([[0, 1, 2, 3]]), 2).item(), 4)  # (ln 2 + 0) / 2
        0.3466
    """
    B, T, E = probability.shape
    slots = T // window  # a row holds at most so many whole windows; one slot more takes the tokens outside of them
    end_BT = torch.arange(T, device=position.device) - position % window + window - 1
    last_position_BT = position.gather(1, end_BT.clamp(max=T - 1))
    whole_BT = (position >= 0) & (end_BT < T) & (last_position_BT - position == window - 1 - position % window)
    ends_BT = whole_BT & (position % window == window - 1)
    earlier_BT = ends_BT.cumsum(dim=1) - ends_BT.long()
    slot_BT = earlier_BT.where(whole_BT, slots)
    sums = probability.new_zeros(B, slots + 1, E).scatter_add(1, slot_BT[:, :, None].expand(B, T, E), probability)
    counted = torch.arange(slots, device=position.device) < ends_BT.sum(dim=1, keepdim=True)
    mean = sums[:, :-1] / window
    entropy = -(mean * mean.clamp_min(torch.finfo(mean.dtype).tiny).log()).sum(dim=-1)
    return masked_mean(entropy, counted)
