"""Compute the scores that a router selects by, whose top K are the chosen experts, from its logits."""

import torch
from torch import Tensor, nn

from consistency_reg.routing import WEIGHTS


def selection_scores(router: nn.Module, logits: Tensor) -> Tensor:
    """Return what a top-k router selects by, [..., E] with the graph of the logits, as its attributes tell.

    A softmax or a sigmoid keeps the order of the logits, so these are the scores. With a correction bias (DeepSeek-V3)
    selection is by ``weight(logits) + bias``, and experts outside the best groups are ruled out (minus infinity).
    """
    bias = getattr(router, "e_score_correction_bias", None)
    if bias is None:
        return logits
    scores = biased_weights(logits, bias, score_function(router))
    groups, kept = getattr(router, "num_group", 1), getattr(router, "topk_group", 1)
    return scores if groups is None else in_best_groups(scores, groups, kept)


def score_function(router: nn.Module) -> str:
    """Return how a router turns logits into weights, by its attributes: a key of ``routing.WEIGHTS``."""
    named = getattr(router, "expert_selection_fn", None)  # Cohere2-MoE
    if named is not None:
        return str(named)
    activation = type(getattr(router, "score_fn", None)).__name__  # DeepSeek-V4
    if activation in ACTIVATIONS:
        return ACTIVATIONS[activation]
    return "softmax" if getattr(router, "e_score_correction_bias", None) is None else "sigmoid"


ACTIVATIONS = {"SqrtSoftplusActivation": "sqrtsoftplus", "Sigmoid": "sigmoid", "Softmax": "softmax"}


def biased_weights(logits: Tensor, bias: Tensor, weights: str) -> Tensor:
    """Return ``weights(logits) + bias``, no gradient to the bias: it is moved by the balance of load, not by a loss."""
    return WEIGHTS[weights](logits) + bias.detach().flatten()


def in_best_groups(
    scores: Tensor, groups: int, kept: int, *, best_of: int = 2, outside: float = -float("inf")
) -> Tensor:
    """Return scores in which only the ``kept`` best of equal groups of neighbours take part; [..., E].

    A group is as good as the sum of its ``best_of`` highest scores; the others' scores become ``outside``.

    Example:
        >>> in_best_groups(torch.tensor([4.0, 0.0, 3.0, 2.0]), groups=2, kept=1)
        tensor([-inf, -inf, 3., 2.])
        >>> in_best_groups(torch.tensor([4.0, 0.0, 3.0, 2.0]), groups=2, kept=1, best_of=1)
        tensor([4., 0., -inf, -inf])
    """
    if kept >= groups:
        return scores
    grouped = scores.unflatten(-1, (groups, -1))
    best = grouped.topk(best_of, dim=-1).values.sum(dim=-1).topk(kept, dim=-1).indices
    ruled_out = scores.new_ones(grouped.shape[:-1]).scatter(-1, best, 0).bool()
    return grouped.masked_fill(ruled_out[..., None], outside).flatten(-2)


def members(expert_ids: Tensor, num_experts: int) -> Tensor:
    """Return 1 for the chosen experts and 0 for the others, which selects the same; [..., K] -> [..., E]."""
    chosen = torch.zeros(*expert_ids.shape[:-1], num_experts, device=expert_ids.device)
    return chosen.scatter(-1, expert_ids, 1.0)
