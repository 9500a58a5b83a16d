"""The local-consistency losses: SRP, or the hit rate of a cache of known size, by the envelope theorem."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from consistency_reg.functional.consistency import (
    Marginals,
    count_histogram,
    hit_rate_marginals,
    lru_residents,
    margin_membership,
    srp_marginals,
)
from consistency_reg.functional.segments import active_experts, check_segment_lengths, window_ends, window_sums
from consistency_reg.losses.base import RoutingLoss
from consistency_reg.losses.distributed import all_sum, world_size
from consistency_reg.routing import LayerRouting, RoutingTrace

SCOPES = ("global", "batch", "sequence")
MEMBERSHIPS = ("margin", "probability")


class EnvelopeLoss(RoutingLoss):
    """1 - value, where the value is optimal in what it holds fixed, so that only the activations move it.

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
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature must be a positive number, got {temperature}")
        if balance_neutral is None:
            balance_neutral = "slope" if membership == "margin" else True
        if balance_neutral not in (True, False, "slope"):
            raise ValueError(f"balance_neutral must be True, False, 'slope' or None, got {balance_neutral!r}")
        if balance_neutral == "slope" and membership != "margin":
            raise ValueError("balance_neutral='slope' needs membership='margin': a probability has no slope of its own")
        if scope not in SCOPES:
            raise ValueError(f"scope must be one of {SCOPES}, got {scope!r}")
        self.membership = membership
        self.temperature = float(temperature)
        self.balance_neutral = balance_neutral
        self.scope = scope

    def marginals(self, layer: LayerRouting, position: Tensor) -> Iterator[Marginals]:
        """The values to average, one at a time, each with its derivative by the activations; no graph."""
        raise NotImplementedError

    def layer_loss(self, layer: LayerRouting, trace: RoutingTrace) -> Tensor:
        """1 - value of one layer, with the surrogate's gradient."""
        if layer.scores is None:
            raise ValueError(
                f"layer {layer.name!r}: the loss needs the router's scores, but the trace holds expert ids only"
            )
        with torch.no_grad():
            miss, terms = layer.scores.new_zeros((), dtype=torch.float64), layer.expert_ids.new_zeros(())
            marginal_BTE: Tensor | None = None
            for term in self.marginals(layer, trace.positions):
                miss += (1 - term.value) * term.counted
                marginal_BTE = term.marginal if marginal_BTE is None else marginal_BTE.add_(term.marginal)
                terms += term.counted
                del term  # its memory is free for the next
            assert marginal_BTE is not None
            terms.clamp_min_(1)
        return self._attach(miss / terms, marginal_BTE.div_(terms), layer, trace.valid_mask)

    def _attach(self, value: Tensor, marginal: Tensor, layer: LayerRouting, valid: Tensor) -> Tensor:
        """``value``, with the gradient of ``-sum(marginal * membership)``; overwrites ``marginal``."""
        source = layer.scores if self.membership == "margin" else layer.logits
        if source is None:
            raise ValueError(
                f"layer {layer.name!r}: membership='probability' needs the router's logits, but the trace holds none"
            )
        value = value.to(torch.promote_types(source.dtype, torch.float32))
        if not (source.requires_grad and torch.is_grad_enabled()):
            return value
        padding_BT1 = ~valid[:, :, None]
        layer = replace(layer, expert_ids=layer.expert_ids.masked_fill(padding_BT1, 0))  # there it may be any number
        with torch.enable_grad():
            leaf = source.detach().requires_grad_()
            soft, scale = self._soft_activations(leaf, layer)
        if self.balance_neutral:
            marginal -= self._usual(marginal, valid, soft, leaf)
        # These numbers are too small for fp16, where they would lose digits: they are kept in units of the largest.
        unit = torch.stack(marginal.aminmax()).abs().amax().clamp_min(torch.finfo(marginal.dtype).tiny)
        (gradient,) = torch.autograd.grad(soft, leaf, marginal.div_(-unit).to(soft.dtype))
        if self.scope == "global":
            scale = scale * world_size()  # data-parallel training averages the processes' gradients
        return _Attach.apply(source, gradient.masked_fill_(padding_BT1, 0), unit * scale, value)

    def _soft_activations(self, source: Tensor, layer: LayerRouting) -> tuple[Tensor, int]:
        """[B, T, E] and a number; the soft memberships are their product."""
        if self.membership == "margin":
            return margin_membership(source, layer.expert_ids, self.temperature), 1
        return replace(layer, logits=source).probabilities, layer.top_k

    def _usual(self, marginal: Tensor, valid: Tensor, soft: Tensor, leaf: Tensor) -> Tensor:
        """Each expert's (weighted) mean marginal over the valid tokens of its group: [1 or B, 1, E]."""
        weight = valid[:, :, None].to(marginal.dtype)
        if self.balance_neutral == "slope":
            (slope,) = torch.autograd.grad(soft.sum(), leaf, retain_graph=True)
            weight = slope.to(marginal.dtype).square_().masked_fill_(~valid[:, :, None], 0)
        group = (1,) if self.scope == "sequence" else (0, 1)
        weighted = (marginal * weight).sum(dim=group, keepdim=True)
        total = weight.sum(dim=group, keepdim=True).expand_as(weighted)
        if self.scope == "global":
            weighted, total = all_sum(weighted, total)
        return weighted / total.clamp_min(torch.finfo(total.dtype).tiny)


class LocalConsistencyLoss(EnvelopeLoss):
    r"""1 - SRP of the batch, averaged over segment lengths and layers, with the gradient of the envelope theorem.

    With the activations ``a[e, t]``, the window counts ``f[e, w]``, the best threshold and its resident sets
    ``R[e, w] = [f[e, w] >= threshold]``: ``dSRP/df[e, w] = (2*R[e, w] - SRP) / D``, ``D = m*sum(R) + sum(f)``.
    Summed over the windows that cover t this is ``g[e, t]``, what activating e on t is worth, and the surrogate is
    ``-sum(g * s)`` with soft memberships s. The value is exactly ``1 - SRP``.

    Args:
        segment_lengths: m, in tokens; those longer than every document of a batch are left out of its mean.
        temperature: see :class:`EnvelopeLoss`, as are the options below.

    Example:
        >>> logits = torch.tensor([[[2.0, 1.0, 0.0]] * 8], requires_grad=True)
        >>> trace = RoutingTrace([logits.topk(1).indices], num_experts=3, logits=[logits])
        >>> LocalConsistencyLoss(segment_lengths=(4,))(trace).item()  # the same expert all along: SRP is 1
        0.0
    """

    def __init__(
        self,
        segment_lengths: Sequence[int] = (4, 16, 64),
        temperature: float = 1.0,
        balance_neutral: bool | Literal["slope"] | None = None,
        *,
        membership: Literal["margin", "probability"] = "margin",
        scope: Literal["global", "batch", "sequence"] = "global",
    ) -> None:
        super().__init__(membership=membership, temperature=temperature, balance_neutral=balance_neutral, scope=scope)
        self.segment_lengths = check_segment_lengths(segment_lengths, lowest=2)

    def marginals(self, layer: LayerRouting, position: Tensor) -> Iterator[Marginals]:
        """SRP of each segment length."""
        active = active_experts(layer.expert_ids, layer.num_experts, position >= 0)
        for m in self.segment_lengths:
            counts = window_sums(active, m)
            histogram = count_histogram(counts, window_ends(position, m), m, by_row=self.scope == "sequence")
            if self.scope == "global":
                (histogram,) = all_sum(histogram)
            yield srp_marginals(counts, position, histogram, m)

    def extra_repr(self) -> str:
        """The options, for printing."""
        return f"segment_lengths={self.segment_lengths}, membership={self.membership!r}, temperature={self.temperature}"


class CacheConsistencyLoss(EnvelopeLoss):
    """1 - hit rate of an LRU cache of known size, the sibling of :class:`LocalConsistencyLoss` for a known device.

    Resident before t are the experts that the simulated cache holds, and
    ``g[e, t] = (2*R[e, t] - hit rate) / (2*accesses)``. The value is the miss rate over all accesses of the batch, the
    first uses of a document included (nothing is resident before them).

    Args:
        cache_ratio: rho, cache slots as a multiple of K; ``C = round(rho * K)``, at most E.
        temperature: see :class:`EnvelopeLoss`, as are the options below.
    """

    def __init__(
        self,
        cache_ratio: float = 2.0,
        temperature: float = 1.0,
        balance_neutral: bool | Literal["slope"] | None = None,
        *,
        membership: Literal["margin", "probability"] = "margin",
        scope: Literal["global", "batch", "sequence"] = "global",
    ) -> None:
        super().__init__(membership=membership, temperature=temperature, balance_neutral=balance_neutral, scope=scope)
        if not 0 < cache_ratio < float("inf"):
            raise ValueError(f"cache_ratio must be a positive number, got {cache_ratio}")
        self.cache_ratio = float(cache_ratio)

    def marginals(self, layer: LayerRouting, position: Tensor) -> Iterator[Marginals]:
        """The hit rate."""
        slots = min(max(round(self.cache_ratio * layer.top_k), 1), layer.num_experts)
        active = active_experts(layer.expert_ids, layer.num_experts, position >= 0)
        residents = lru_residents(layer.expert_ids, layer.num_experts, position, slots)
        group = (1, 2) if self.scope == "sequence" else (0, 1, 2)
        hits, accesses = (active * residents).sum(dim=group).view(-1), active.sum(dim=group).view(-1)
        if self.scope == "global":
            hits, accesses = all_sum(hits, accesses)
        yield hit_rate_marginals(residents, active, hits, accesses)

    def extra_repr(self) -> str:
        """The options, for printing."""
        return f"cache_ratio={self.cache_ratio}, membership={self.membership!r}, temperature={self.temperature}"


class _Attach(torch.autograd.Function):
    """A value whose gradient by ``source`` is known, ``gradient * unit``: the graph holds that and nothing else."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, gradient: Tensor, unit: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(gradient, unit)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        gradient, unit = ctx.saved_tensors
        factor = grad_outputs[0] * unit  # first the loss scale of mixed precision, then the router's dtype
        return (gradient.to(factor.dtype) * factor).to(gradient.dtype), None, None, None
