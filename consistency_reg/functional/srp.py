"""Segment routing best performance (SRP): how well a fixed set of experts per segment could serve a router's choices.

Source: arXiv 2505.16056. N sequences, T tokens, E routed experts of a layer, K active per token, m segment length;
``f[e, p]`` is the number of tokens of the window p (m consecutive tokens of one document) on which e is active.

The way from ids to SRP has three steps, each a function:
:func:`~consistency_reg.functional.srp_counts.srp_counts` (integers that add up over batches),
:func:`best_f1` (the threshold), :func:`layer_srp` and :func:`model_srp` (the result).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from consistency_reg.functional.segments import check_segment_lengths
from consistency_reg.functional.srp_counts import srp_counts
from consistency_reg.routing import RoutingTrace


@dataclass(frozen=True)
class BestF1:
    """Holds the best segment router of each group of (expert, window) pairs; every tensor has the groups' shape.

    Attributes:
        f1: float64, ``max_a 2 TP(a) / (P(a) + A)``, the SRP of the group; 0 where it is never active.
        threshold: int64, a*, the first threshold that reaches the maximum.
        loaded: int64, ``P(a*)``, tokens x experts that the segment router keeps ready.
        hits: int64, ``TP(a*)``, those of them that the router uses.
        active: int64, ``A``, tokens x experts that the router uses.
    """

    f1: Tensor
    threshold: Tensor
    loaded: Tensor
    hits: Tensor
    active: Tensor

    @property
    def size_ratio(self) -> Tensor:
        """rho_hat = P(a*) / A in float64: experts that the segment router loads for one that the router uses."""
        return torch.where(self.active > 0, self.loaded / self.active.clamp_min(1).double(), 0.0)


@dataclass(frozen=True)
class SRPResult:
    """SRP of one layer for one segment length; ratios are float64 scalars.

    Attributes:
        srp: F1 of the best segment router with one threshold for all experts of the layer.
        size_ratio: rho_hat, the experts that this router loads for one that is used.
        threshold: int64, it loads an expert that is active on at least so many tokens of the segment.
        static_srp: F1 of the best set of experts that serves the whole data.
        local_gain: ``srp - static_srp``, the consistency that is not imbalance.
        per_expert: [E], SRP of each expert with a threshold of its own.
        histogram: [E, m+1] int64, the windows counted by expert and f.
        interval: [2], 95% bootstrap interval of ``srp``; None where there was no bootstrap.
    """

    srp: Tensor
    size_ratio: Tensor
    threshold: Tensor
    static_srp: Tensor
    local_gain: Tensor
    per_expert: Tensor
    histogram: Tensor
    interval: Tensor | None = None


@dataclass(frozen=True)
class ModelSRP:
    """SRP of a whole model for one segment length: one threshold for the experts of all layers.

    Attributes:
        srp, size_ratio, threshold, static_srp, local_gain, interval: as in :class:`SRPResult`, all layers pooled.
        histogram: [m+1] int64, over the experts of all layers.
        layers: the result of each layer, with a threshold of its own.
    """

    srp: Tensor
    size_ratio: Tensor
    threshold: Tensor
    static_srp: Tensor
    local_gain: Tensor
    histogram: Tensor
    layers: tuple[SRPResult, ...]
    interval: Tensor | None = None


@overload
def srp(
    expert_ids: Tensor,
    num_experts: int,
    segment_length: int,
    valid: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> SRPResult: ...
@overload
def srp(
    expert_ids: Tensor,
    num_experts: int,
    segment_length: Sequence[int],
    valid: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> dict[int, SRPResult]: ...
@overload
def srp(
    expert_ids: Sequence[Tensor],
    num_experts: int | Sequence[int],
    segment_length: int,
    valid: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> ModelSRP: ...
@overload
def srp(
    expert_ids: Sequence[Tensor],
    num_experts: int | Sequence[int],
    segment_length: Sequence[int],
    valid: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> dict[int, ModelSRP]: ...
def srp(
    expert_ids: Tensor | Sequence[Tensor],
    num_experts: int | Sequence[int],
    segment_length: int | Sequence[int],
    valid: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> SRPResult | ModelSRP | dict[int, SRPResult] | dict[int, ModelSRP]:
    """Return the SRP of one layer, or of a model when a list of layers is given.

    Args:
        expert_ids: [N, T, K] int64, or a list of them with one for each layer.
        num_experts: E; one for all layers or one for each.
        segment_length: m in tokens; several of them in one call give a result for each.
        valid: [N, T] bool, True for real tokens; all when None.
        document_ids: [N, T] integers; one document a row when None. No window leaves its document.

    Returns:
        The result of the layer or of the model; a dict from m to results when several m are given.

    Raises:
        TypeError: ids that are not int64, masks of a wrong dtype.
        ValueError: shapes that do not match, K > E, ids out of range or repeated within a token, an m that is no
            integer of at least 1.

    Example:
        >>> result = srp(torch.tensor([[[0], [0], [1], [1]]]), num_experts=2, segment_length=2)
        >>> [round(float(value), 4) for value in (result.srp, result.size_ratio, result.static_srp, result.local_gain)]
        [0.8571, 1.3333, 0.6667, 0.1905]
    """
    layers = [expert_ids] if isinstance(expert_ids, Tensor) else expert_ids
    trace = RoutingTrace(layers, num_experts, valid=valid, document_ids=document_ids)
    trace.check_values()
    lengths = check_segment_lengths(segment_length, name="segment_length")
    counts = [srp_counts(layer.expert_ids, layer.num_experts, lengths, valid, document_ids) for layer in trace]
    usage = [layer.usage for layer in counts]
    tokens = usage[0].sum() // trace.expert_ids[0].shape[-1]
    models = {m: model_srp([layer.windows[m] for layer in counts], usage, tokens) for m in lengths}
    results = {m: model.layers[0] for m, model in models.items()} if isinstance(expert_ids, Tensor) else models
    return results[segment_length] if isinstance(segment_length, int) else results


def best_f1(histogram: Tensor, segment_length: int) -> BestF1:
    """Return the threshold on f that predicts activations best, for each group, from how often each f occurs.

    ``TP(a) = sum_{j>=a} j H[j]``, ``P(a) = m sum_{j>=a} H[j]``, ``A = sum_j j H[j]``,
    ``F1(a) = 2 TP(a) / (P(a) + A)`` for a = 0..m. Reads no value on the host and carries no gradient.

    Args:
        histogram: [..., m+1] integers; ``H[j]`` is the number of (expert, window) pairs of a group with f = j.
        segment_length: m.

    Raises:
        TypeError: a histogram that is not of integers.
        ValueError: a last dimension other than m + 1.

    Example:
        >>> best = best_f1(torch.tensor([[2, 0, 1], [3, 0, 0]]), segment_length=2)
        >>> best.f1, best.threshold
        (tensor([1., 0.], dtype=torch.float64), tensor([1, 0]))
    """
    if histogram.is_floating_point() or histogram.dtype == torch.bool:
        raise TypeError(f"histogram must be an integer tensor, got {histogram.dtype}")
    if histogram.dim() == 0 or histogram.shape[-1] != segment_length + 1:
        shape = list(histogram.shape)
        raise ValueError(f"histogram must have shape [..., m+1] with m={segment_length}, got {shape}")
    count = torch.arange(segment_length + 1, device=histogram.device)
    loaded = segment_length * _sum_from(histogram)
    hits = _sum_from(histogram * count)
    active = hits[..., 0]
    best, threshold = _f1(hits, loaded + active[..., None]).max(dim=-1)
    at_best = threshold[..., None]
    return BestF1(
        f1=best,
        threshold=threshold,
        loaded=loaded.gather(-1, at_best)[..., 0],
        hits=hits.gather(-1, at_best)[..., 0],
        active=active,
    )


def static_srp(usage: Tensor, tokens: Tensor) -> Tensor:
    """Return F1 of the best set that is never changed: ``max_S 2 sum_S q / (|S| + K)``, ``q = usage / tokens``.

    Args:
        usage: [..., E] integers, tokens on which each expert is active. For a model: of all layers side by side.
        tokens: valid tokens, a scalar or [...].

    Returns:
        [...] float64; 0 where nothing is used.

    Example:
        >>> static_srp(torch.tensor([4, 2, 2]), torch.tensor(4))
        tensor(0.8000, dtype=torch.float64)
    """
    hits = usage.sort(dim=-1, descending=True).values.cumsum(dim=-1)
    size = torch.arange(1, usage.shape[-1] + 1, device=usage.device)
    return _f1(hits, size * tokens[..., None] + hits[..., -1:]).amax(dim=-1)


def layer_srp(windows: Tensor, usage: Tensor, tokens: Tensor) -> SRPResult:
    """Return the result of one layer from its counts: windows [E, m+1], usage [E], tokens a scalar."""
    m = windows.shape[-1] - 1
    layer = best_f1(windows.sum(dim=0), m)
    static = static_srp(usage, tokens)
    return SRPResult(
        srp=layer.f1,
        size_ratio=layer.size_ratio,
        threshold=layer.threshold,
        static_srp=static,
        local_gain=layer.f1 - static,
        per_expert=best_f1(windows, m).f1,
        histogram=windows,
    )


def model_srp(windows: Sequence[Tensor], usage: Sequence[Tensor], tokens: Tensor) -> ModelSRP:
    """Return the result of a model from its layers' counts: windows [E, m+1] and usage [E] of each, tokens a scalar."""
    pooled = torch.stack([layer.sum(dim=0) for layer in windows]).sum(dim=0)
    model = best_f1(pooled, len(pooled) - 1)
    static = static_srp(torch.cat(list(usage)), tokens)
    return ModelSRP(
        srp=model.f1,
        size_ratio=model.size_ratio,
        threshold=model.threshold,
        static_srp=static,
        local_gain=model.f1 - static,
        histogram=pooled,
        layers=tuple(layer_srp(*layer, tokens) for layer in zip(windows, usage, strict=True)),
    )


def _sum_from(values: Tensor) -> Tensor:
    """Return ``out[..., a] = sum_{j>=a} values[..., j]`` in int64."""
    return values.flip(-1).cumsum(-1, dtype=torch.int64).flip(-1)


def _f1(hits: Tensor, predicted_and_active: Tensor) -> Tensor:
    """Return ``2 hits / (predicted + active)`` in float64, correctly rounded; 0 where both are 0."""
    return 2 * hits / predicted_and_active.clamp_min(1).double()
