"""Weights of experts from a router's logits, and the distribution over experts that these make."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

LOWEST = -80.0  # softplus(x) is e^x there, still a normal number in fp32

# by score function: logits [..., E] -> weights, before they are normalized
WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": partial(torch.softmax, dim=-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda logits: nn.functional.softplus(logits).sqrt(),
}
# by score function: logits [..., E] -> logarithms of the weights
LOG_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits,  # up to a constant of each token
    "sigmoid": nn.functional.logsigmoid,
    "sqrtsoftplus": lambda logits: nn.functional.softplus(logits.clamp_min(LOWEST)).log() / 2,
}
SCORE_FUNCTIONS = tuple(WEIGHTS)


def probabilities(logits: Tensor, score_function: str = "softmax") -> Tensor:
    """Return a router's distribution over experts from its logits [..., E], in fp32 or better: all weights normalized.

    Example:
        >>> probabilities(torch.tensor([0.0, 0.0]), "sigmoid")
        tensor([0.5000, 0.5000])
    """
    weights = WEIGHTS[score_function](exact(logits))
    if score_function == "softmax":
        return weights
    return weights / weights.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)


def exact(logits: Tensor) -> Tensor:
    """Return logits in fp32, or in fp64 where they are."""
    return logits if logits.dtype == torch.float64 else logits.float()
