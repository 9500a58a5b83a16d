"""The terms of StickyMoE's loss: the step between neighbours and the drift from a window's start.

Means divide by what was counted and are 0, with a graph, where there was nothing to count.

B rows, T tokens, E routed experts of the layer, K active per token, p the router's distribution, W window length.
"""

import torch
from torch import Tensor

from consistency_reg.functional.pairs import has_predecessor, masked_mean


def mean_squared_step(probability: Tensor, position: Tensor) -> Tensor:
    """Return ``mean ‖p_t - p_{t-1}‖²`` over the adjacent pairs: [B, T, E] -> scalar.

    Example:
        >>> mean_squared_step(torch.eye(2)[None, [0, 0, 1]], torch.tensor([[0, 1, 2]]))
        tensor(1.)
    """
    step = probability[:, 1:] - probability[:, :-1]
    return masked_mean(step.square().sum(dim=-1), has_predecessor(position, 1))


def mean_window_drift(probability: Tensor, position: Tensor, window: int) -> Tensor:
    """Return ``mean ((t - s) / W) ‖p_t - p_s‖²``, s the start of t's window, over the tokens that have a predecessor.

    Example:
        >>> mean_window_drift(torch.eye(2)[None, [0, 1, 1]], torch.tensor([[0, 1, 2]]), 2)  # (1/2 * 2 + 0) / 2
        tensor(0.5000)
    """
    T = position.shape[1]
    since_start = position % window
    start = (torch.arange(T, device=position.device) - since_start).clamp_min(0)
    drift = (probability - probability.gather(1, start[:, :, None].expand_as(probability))).square().sum(dim=-1)
    return masked_mean(since_start.to(drift.dtype) / window * drift, position >= 1)
