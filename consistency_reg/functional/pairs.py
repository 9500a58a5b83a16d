"""Tokens and their predecessors in the same document, and means over what was counted.

B rows, T tokens.
"""

from torch import Tensor


def masked_mean(values: Tensor, counted: Tensor) -> Tensor:
    """Return the mean of ``values`` where ``counted``, 0 where nothing is; what is not counted must be finite."""
    return (values * counted).sum() / counted.sum().clamp_min(1)


def has_predecessor(position: Tensor, distance: int) -> Tensor:
    """Return whether the token ``distance`` before is of the same document: [B, T] positions -> [B, T - distance] bool.

    Example:
        >>> import torch
        >>> has_predecessor(torch.tensor([[0, 1, 2, 0, 1, -1]]), 1)
        tensor([[ True,  True, False,  True, False]])
    """
    return position[:, distance:] >= distance
