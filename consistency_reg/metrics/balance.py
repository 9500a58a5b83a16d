"""Balance of a model as a metric: over the whole data, within segments and documents, and from token to token."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from consistency_reg.functional.balance import (
    Mean,
    UsageBalance,
    local_cv_means,
    overlap_mean,
    usage_balance,
    usage_counts,
)
from consistency_reg.functional.segments import check_segment_lengths
from consistency_reg.metrics.base import RoutingMetric
from consistency_reg.metrics.plots import axes_of
from consistency_reg.routing import RoutingTrace


@dataclass(frozen=True)
class ModelBalance:
    """Balance of every layer; tensors are float64 [L] unless told otherwise.

    Attributes:
        layers: the global balance of each layer.
        usage: for each layer [E] float64, the usage shares, which sum to K.
        local_cv: for each segment length, and None for whole documents, the mean CV within it.
        overlap: share of a token's experts that its predecessor used too.
    """

    layers: tuple[UsageBalance, ...]
    usage: tuple[Tensor, ...]
    local_cv: dict[int | None, Tensor]
    overlap: Tensor


class RoutingBalance(RoutingMetric):
    """Global and local balance and the overlap rate of every layer; layers are never pooled, as that hides imbalance.

    ``compute()`` gives ``balance_sd`` [percentage points], ``balance_cv``, ``local_cv_m16``, ``local_cv_document`` and
    ``overlap`` as means over the layers, ``balance_max_over_mean`` and ``balance_min_share`` of the worst layer, and
    ``balance_cv``, ``balance_min_share`` and ``overlap`` of each layer. ``results()`` gives a :class:`ModelBalance`.
    See :mod:`consistency_reg.functional.balance` for what is measured.

    Args:
        num_experts: E of each layer, in the model's order.
        segment_lengths: the m of the local CV.
        options: see :class:`~consistency_reg.metrics.base.RoutingMetric`.

    Example:
        >>> metric = RoutingBalance([2], segment_lengths=[2])
        >>> metric.update(RoutingTrace([torch.tensor([[[0], [0], [1], [1]]])], num_experts=2))
        >>> {name: round(float(value), 3) for name, value in metric.compute().items() if "cv" in name}
        {'balance_cv': 0.0, 'local_cv_document': 0.0, 'local_cv_m2': 0.667, 'balance_cv_layer_00': 0.0}
    """

    higher_is_better = False
    usage: Tensor
    tokens: Tensor
    overlap_shared: Tensor
    overlap_accesses: Tensor

    def __init__(
        self, num_experts: int | Sequence[int], segment_lengths: int | Sequence[int] = (16,), **options: Any
    ) -> None:
        super().__init__(num_experts, **options)
        self.segments: tuple[int | None, ...] = (None, *check_segment_lengths(segment_lengths))
        layers = len(self.num_experts)
        self._add_sum("usage", sum(self.num_experts))
        self._add_sum("tokens")
        self._add_sum("overlap_shared", layers)
        self._add_sum("overlap_accesses", layers)
        for m in self.segments:
            total, count = _cv_states(m)
            self._add_sum(total, layers, dtype=torch.float64)
            self._add_sum(count, layers)

    def update(self, trace: RoutingTrace) -> None:
        """Count a batch. On a GPU the host does not wait."""
        self._check(trace)
        ids = [(layer.expert_ids, layer.num_experts) for layer in trace]
        masks = trace.valid, trace.document_ids
        self._add("tokens", trace.valid_mask.sum())
        self._add("usage", torch.cat([usage_counts(*layer, trace.valid) for layer in ids]))
        self._add_means("overlap_shared", "overlap_accesses", [overlap_mean(*layer, *masks) for layer in ids])
        local = [local_cv_means(*layer, self.segments, *masks) for layer in ids]
        for m in self.segments:
            self._add_means(*_cv_states(m), [layer[m] for layer in local])

    def plot(self, val: ModelBalance | None = None, ax: Any = None) -> Any:
        """CV of usage by layer, global against local: what consistency needs is the gap. -> (figure, axes)."""
        results = self.results() if val is None else val
        ax = axes_of(ax)
        depth = range(len(results.layers))
        ax.plot(depth, [float(layer.cv) for layer in results.layers], marker="o", label="global")
        for m, cv in results.local_cv.items():
            ax.plot(depth, cv.tolist(), marker="o", label="in a document" if m is None else f"in {m} tokens")
        ax.set(xlabel="layer", ylabel="CV of expert usage")
        ax.legend()
        return ax.figure, ax

    def _add_means(self, total: str, count: str, layers: Sequence[Mean]) -> None:
        self._add(total, torch.stack([layer.total for layer in layers]))
        self._add(count, torch.stack([layer.count for layer in layers]))

    def _results(self) -> ModelBalance:
        usage = [self.usage[experts] for experts in self._layer_experts]
        return ModelBalance(
            layers=tuple(usage_balance(layer, self.tokens) for layer in usage),
            usage=tuple(layer / self.tokens.clamp_min(1).double() for layer in usage),
            local_cv={m: Mean(*(getattr(self, state) for state in _cv_states(m))).value for m in self.segments},
            overlap=Mean(self.overlap_shared, self.overlap_accesses).value,
        )

    def _scalars(self, results: ModelBalance) -> dict[str, Tensor]:
        sd, cv, max_over_mean, min_share = (
            torch.stack([getattr(layer, name) for layer in results.layers])
            for name in ("sd", "cv", "max_over_mean", "min_share")
        )
        model = {
            "balance_sd": sd.mean(),
            "balance_cv": cv.mean(),
            "balance_max_over_mean": max_over_mean.max(),
            "balance_min_share": min_share.min(),
            "overlap": results.overlap.mean(),
        }
        local = {f"local_cv_{_label(m)}": value.mean() for m, value in results.local_cv.items()}
        layers = {"balance_cv": cv, "balance_min_share": min_share, "overlap": results.overlap}
        for name, values in layers.items():
            local |= self._by_layer(name, values)
        return model | local


def _label(segment_length: int | None) -> str:
    return "document" if segment_length is None else f"m{segment_length}"


def _cv_states(segment_length: int | None) -> tuple[str, str]:
    return f"cv_total_{_label(segment_length)}", f"cv_count_{_label(segment_length)}"
