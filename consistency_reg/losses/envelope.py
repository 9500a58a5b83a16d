"""Derive losses by the envelope theorem, where the value is optimal in what it holds fixed."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor

from consistency_reg.devices import is_on_host
from consistency_reg.distributed import all_sum, largest, world_size
from consistency_reg.functional.consistency import Marginals, margin_membership
from consistency_reg.losses.base import RoutingLoss
from consistency_reg.losses.options import check_positive, check_scope
from consistency_reg.routing import LayerRouting, LayerStack, RoutingTrace, probabilities
from consistency_reg.routing.documents import row_chunks

MEMBERSHIPS = ("margin", "probability")
# Tokens x experts of the layers that are worked on together, if a single one is not larger.
STACKED = 2**16  # stays in a CPU's cache
STACKED_ON_GPU = 2**22  # fills it, and takes about 150 MB


class EnvelopeLoss(RoutingLoss):
    """Computes 1 - value for a value that is optimal in what it holds fixed, so that only the activations move it.

    A subclass says what the value is and what each activation is worth (:meth:`marginals`); this class makes the hard
    activations soft, keeps the gradient from favouring an expert everywhere, and attaches it to the router.

    Args:
        membership: how a score becomes a soft activation. "margin": ``sigmoid((score - theta) / temperature)``, theta
            halfway between the K-th and the (K+1)-th score, no gradient through it. "probability": K times the
            router's probability.
        temperature: width of the margin, in units of the router's score. Only for "margin".
        balance_neutral: subtract from each expert's marginals their mean over the valid tokens, so that the loss
            cannot raise its value by making an expert popular everywhere. "slope" weights this mean by the squared
            slope of the membership: then a gradient step on the scores leaves each expert's soft usage where it is,
            to first order. Only for "margin", where it is the default; for "probability" that is True.
        scope: what shares one value. "global": the batch over all data-parallel processes; "batch": the batch of this
            process; "sequence": each row by itself, averaged over the rows.
    """

    def __init__(
        self,
        *,
        membership: Literal["margin", "probability"] = "margin",
        temperature: float = 1.0,
        balance_neutral: bool | Literal["slope"] | None = None,
        scope: Literal["global", "batch", "sequence"] = "global",
    ) -> None:
        super().__init__()
        if membership not in MEMBERSHIPS:
            raise ValueError(f"membership must be one of {MEMBERSHIPS}, got {membership!r}")
        if balance_neutral is None:
            balance_neutral = "slope" if membership == "margin" else True
        if balance_neutral not in (True, False, "slope"):
            raise ValueError(f"balance_neutral must be True, False, 'slope' or None, got {balance_neutral!r}")
        if balance_neutral == "slope" and membership != "margin":
            raise ValueError("balance_neutral='slope' needs membership='margin': a probability has no slope of its own")
        self.membership = membership
        self.temperature = check_positive("temperature", temperature)
        self.balance_neutral = balance_neutral
        self.scope = check_scope(scope)

    def marginals(self, layers: LayerStack, position: Tensor) -> Iterator[Marginals]:
        """Yield the values to average, one at a time, each with its derivative by the activations; no graph.

        Args:
            layers: S layers of one shape.
            position: [B, T] index of each token in its document, -1 on padding.
        """
        raise NotImplementedError

    def per_layer(self, trace: RoutingTrace) -> Tensor:
        """Return 1 - value of every layer [L], with the surrogate's gradient."""
        sources = [self._source(layer) for layer in trace]
        alike = groupby(zip(trace, sources, strict=True), key=lambda pair: _shape(*pair))
        tokens = math.prod(trace.shape)
        if self.scope == "global":  # rows may be longer elsewhere, and processes must sum the same layers together
            tokens = largest(tokens, sources[0].device)
        return torch.cat([self._losses(stack, trace) for _, pairs in alike for stack in _stacks(list(pairs), tokens)])

    def _source(self, layer: LayerRouting) -> Tensor:
        """Return what the soft activations are made of."""
        if layer.scores is None:
            raise ValueError(
                f"layer {layer.name!r}: the loss needs the router's scores, but the trace holds expert ids only"
            )
        if self.membership == "margin":
            return layer.scores
        if layer.logits is None:
            raise ValueError(
                f"layer {layer.name!r}: membership='probability' needs the router's logits, but the trace holds none"
            )
        return layer.logits

    def _losses(self, layers: LayerStack, trace: RoutingTrace) -> Tensor:
        """Return the losses of stacked layers [S]."""
        source = layers.source
        with torch.no_grad():
            miss_S = torch.zeros(len(source), dtype=torch.float64, device=source.device)
            terms_S = torch.zeros_like(miss_S)
            marginal_SBTE: Tensor | None = None
            for term in self.marginals(layers, trace.positions):
                miss_S += (1 - term.value) * term.counted
                marginal_SBTE = term.marginal if marginal_SBTE is None else marginal_SBTE.add_(term.marginal)
                terms_S += term.counted
                del term  # its memory is free for the next
            assert marginal_SBTE is not None
            terms_S.clamp_min_(1)
            marginal_SBTE.div_(terms_S.float()[:, None, None, None])
        value_S = (miss_S / terms_S).to(torch.promote_types(source.dtype, torch.float32))
        if not (source.requires_grad and torch.is_grad_enabled()):
            return value_S
        return self._attach(value_S, marginal_SBTE, layers, source, trace.valid_mask)

    def _attach(self, value: Tensor, marginal: Tensor, layers: LayerStack, source: Tensor, valid: Tensor) -> Tensor:
        """Return ``value`` [S] with the gradient of ``-sum(marginal * membership)``; overwrites ``marginal``."""
        padding_BT1 = ~valid[:, :, None]
        layers = replace(layers, expert_ids=layers.expert_ids.masked_fill(padding_BT1, 0))  # there it may be any number
        with torch.enable_grad():
            leaf = source.detach().requires_grad_()
            soft, scale = self._soft_activations(leaf, layers)
        if self.balance_neutral:
            marginal -= self._usual(marginal, valid, soft, leaf)
        # These numbers are too small for fp16, where they would lose digits: they are kept in units of the largest.
        whole = (-3, -2, -1)
        unit = torch.maximum(marginal.amax(whole, keepdim=True), -marginal.amin(whole, keepdim=True))
        unit.clamp_min_(torch.finfo(marginal.dtype).tiny)
        (gradient,) = torch.autograd.grad(soft, leaf, marginal.div_(-unit).to(soft.dtype))
        if self.scope == "global":
            scale = scale * world_size()  # data-parallel training averages the processes' gradients
        return _Attach.apply(source, gradient.masked_fill_(padding_BT1, 0), unit * scale, value)

    def _soft_activations(self, source: Tensor, layers: LayerStack) -> tuple[Tensor, int]:
        """Return [S, B, T, E] and a number; the soft memberships are their product."""
        if self.membership == "margin":
            return margin_membership(source, layers.expert_ids, self.temperature), 1
        return probabilities(source, layers.score_function), layers.top_k

    def _usual(self, marginal: Tensor, valid: Tensor, soft: Tensor, leaf: Tensor) -> Tensor:
        """Return each expert's (weighted) mean marginal over the valid tokens of its group: [S, 1 or B, 1, E]."""
        weight = valid[:, :, None].to(marginal.dtype)
        if self.balance_neutral == "slope":
            (slope,) = torch.autograd.grad(soft.sum(), leaf, retain_graph=True)
            weight = slope.to(marginal.dtype).square_().masked_fill_(~valid[:, :, None], 0)
        group = (-2,) if self.scope == "sequence" else (-3, -2)
        weighted = (marginal * weight).sum(dim=group, keepdim=True)
        total = weight.sum(dim=group, keepdim=True).expand_as(weighted)
        if self.scope == "global":
            weighted, total = all_sum(weighted, total)
        return weighted / total.clamp_min(torch.finfo(total.dtype).tiny)


def _shape(layer: LayerRouting, source: Tensor) -> tuple[Any, ...]:
    """Return in what neighbouring layers have to agree to be stacked."""
    return layer.num_experts, layer.top_k, layer.score_function, source.dtype, source.device


def _stacks(pairs: Sequence[tuple[LayerRouting, Tensor]], tokens: int) -> Iterator[LayerStack]:
    """Yield layers of one shape with their sources, stacked as far as so many tokens allow."""
    layer, source = pairs[0]
    most = STACKED if is_on_host(source) else STACKED_ON_GPU
    for part in row_chunks(len(pairs), tokens * layer.num_experts, most):
        layers, sources = zip(*pairs[part], strict=True)
        yield LayerStack.of(layers, sources)


class _Attach(torch.autograd.Function):
    """Values whose gradient by ``source`` is known, ``gradient * unit``: the graph holds that and nothing else."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, gradient: Tensor, unit: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(gradient, unit)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        gradient, unit = ctx.saved_tensors
        # First the loss scale of mixed precision, then the router's dtype.
        factor = grad_outputs[0][:, None, None, None] * unit
        return (gradient.to(factor.dtype) * factor).to(gradient.dtype), None, None, None
