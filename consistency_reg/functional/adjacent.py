"""Compute how unlike neighbouring tokens are routed.

Means divide by what was counted and are 0, with a graph, where there was nothing to count.

B rows, T tokens, E routed experts of the layer, K active per token, p the router's distribution.
"""

from torch import Tensor

from consistency_reg.functional.pairs import has_predecessor, masked_mean


def adjacent_dissimilarity(probability: Tensor, position: Tensor) -> Tensor:
    """Return ``mean(1 - <p_t, p_{t-1}>)``: [B, T, E] -> scalar.

    Example:
        >>> import torch
        >>> adjacent_dissimilarity(torch.eye(2)[None, [0, 0, 1]], torch.tensor([[0, 1, 2]]))
        tensor(0.5000)
    """
    likeness = (probability[:, 1:] * probability[:, :-1]).sum(dim=-1)
    return masked_mean(1 - likeness, has_predecessor(position, 1))
