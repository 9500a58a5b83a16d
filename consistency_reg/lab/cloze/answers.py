"""Let a language model answer multiple-choice questions by the likelihood of the answers."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from consistency_reg.lab.cloze.items import Item


@torch.inference_mode()
def log_likelihoods(model: nn.Module, items: Sequence[Item], batch_items: int = 4) -> Tensor:
    """Return the log-likelihood in nats of every answer after its passage.

    Every passage with one answer is read by itself, as a row of its own: where cache-aware routing is attached, each
    begins with an empty cache.

    Args:
        model: a causal language model of transformers in evaluation mode.
        items: questions with equally many answers, all passages and all answers of one length.
        batch_items: the number of questions that are read at once.

    Returns:
        [items, choices] float64.
    """
    device = next(model.parameters()).device
    found = []
    for first in range(0, len(items), batch_items):
        part = items[first : first + batch_items]
        rows = torch.tensor([item.context + choice for item in part for choice in item.choices], device=device)
        context = len(part[0].context)
        logits = model(rows, use_cache=False).logits[:, context - 1 : -1].float()
        nats = nn.functional.cross_entropy(logits.transpose(1, 2), rows[:, context:], reduction="none")
        found.append(-nats.double().sum(dim=1).unflatten(0, (len(part), -1)).cpu())
    return torch.cat(found)


def answered(model: nn.Module, items: Sequence[Item], batch_items: int = 4) -> Tensor:
    """Return for each question whether the likeliest answer is the right one, [items] float64 of 0 and 1."""
    right = torch.tensor([item.right for item in items])
    return (log_likelihoods(model, items, batch_items).argmax(dim=1) == right).double()


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Return the mean of independent values and its standard error; NaN for the error of one value.

    Example:
        >>> mean_and_error(torch.tensor([1.0, 0.0, 1.0, 1.0]))
        (0.75, 0.25)
    """
    error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), error
