"""TRL's fused LM head: its trainers build the loss from the log-probabilities of a forward, not from its loss."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.autograd import Function


def is_fused(given: Mapping[str, Any]) -> bool:
    """Whether a forward was called with TRL's fused LM head (``trl.trainer.utils.add_fused_lm_head``)."""
    return bool(given.get("fused_lm_head"))


def carry(log_probs: Tensor, label_mask: Tensor, weighted: Tensor) -> Tensor:
    """``log_probs`` as they are, whose mean negative log-likelihood has the gradient of ``weighted`` as well.

    A trainer that takes ``-c * sum(log_probs)`` sends ``-c`` back to every predicted token. Over the n tokens of the
    mask that is ``c * n``, this micro-batch's share of the step's tokens times whatever the loss is scaled by (mixed
    precision, accumulation, processes): the factor by which its mean counts, and so the term's.

    Args:
        log_probs: [B, T] log-probabilities of the labels.
        label_mask: [B, T] bool, where there is a label.
        weighted: the weighted term, a scalar.

    Raises:
        RuntimeError: in the backward pass, when the tokens do not count alike ("dft", preference and reward losses):
            there the term's own scale cannot be told.

    Example:
        >>> import torch
        >>> log_probs, term = torch.zeros(2, 3, requires_grad=True), torch.tensor(5.0, requires_grad=True)
        >>> (-carry(log_probs, torch.ones(2, 3, dtype=torch.bool), term).sum() / 12).backward()
        >>> term.grad  # 6 of the step's 12 tokens
        tensor(0.5000)
    """
    return _Carry.apply(log_probs, label_mask, weighted)


class _Carry(Function):
    @staticmethod
    def forward(ctx: Any, log_probs: Tensor, label_mask: Tensor, weighted: Tensor) -> Tensor:
        ctx.save_for_backward(label_mask, weighted)
        return log_probs.view_as(log_probs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, Tensor]:
        (gradient,) = grad_outputs
        label_mask, weighted = ctx.saved_tensors
        share = -(gradient * label_mask).sum()
        of_each = share / label_mask.sum().clamp_min(1)
        if bool((((gradient + of_each) * label_mask).abs() > 1e-3 * of_each.abs()).any()):
            raise RuntimeError(
                "the consistency term is attached to a model whose log-probabilities are trained by something else "
                "than their mean (a 'dft', preference or reward loss), where its scale cannot be told: use "
                "loss_type='nll' of TRL's SFTTrainer"
            )
        return gradient, None, share.to(weighted)
