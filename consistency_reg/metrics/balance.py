"""Balance of a model as a metric: over the whole data, within segments and documents, and from token to token."""

from collections.abc import Callable, Iterator, Sequence
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
from consistency_reg.measures import of_metric
from consistency_reg.measures.reading import segment_name
from consistency_reg.metrics.base import RoutingMetric, Value, axes_of
from consistency_reg.routing import RoutingTrace

OVER_LAYERS: dict[str, Callable[[Tensor], Tensor]] = {"mean": Tensor.mean, "max": Tensor.max, "min": Tensor.min}


@dataclass(frozen=True)
class ModelBalance:
    """Holds the balance of every layer; tensors are float64 [L] unless told otherwise.

    Attributes:
        layers: the global balance of each layer.
        usage: for each layer [E] float64, the usage shares, which sum to K.
        local_cv: for each segment length, and None for whole documents, the mean CV within it.
        overlap: share of a token's experts that its predecessor used too.
        tokens: scalar int64, the valid tokens that were counted.
    """

    layers: tuple[UsageBalance, ...]
    usage: tuple[Tensor, ...]
    local_cv: dict[int | None, Tensor]
    overlap: Tensor
    tokens: Tensor

    @property
    def counts(self) -> tuple[Tensor, ...]:
        """Return for each layer [E] int64, the tokens that used each expert."""
        return tuple((usage_E * self.tokens).round().long() for usage_E in self.usage)

    def of_layers(self, name: str, segment_length: int | None = None) -> Tensor:
        """Return a value of every layer [L]: a field of this, at a segment length, or of :attr:`layers`."""
        own = getattr(self, name, None)
        if own is None:
            return torch.stack([getattr(layer, name) for layer in self.layers])
        return own[segment_length] if isinstance(own, dict) else own

    def values(self) -> Iterator[Value]:
        """Yield balance and overlap of the layers, and what they come to for the model."""
        for measure in of_metric("balance"):
            for m in self.local_cv if measure.by_segment else (None,):
                layers_L = self.of_layers(measure.attribute, m)
                yield Value(measure.at(m), OVER_LAYERS[measure.over_layers](layers_L), list(layers_L))


class RoutingBalance(RoutingMetric):
    """Measures the balance, global and local, and the overlap of each layer; pooled layers would hide imbalance.

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
        """Draw the CV of usage by layer, global and local, and return (figure, axes): consistency needs the gap."""
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
            tokens=self.tokens,
        )


def _cv_states(segment_length: int | None) -> tuple[str, str]:
    return f"cv_total_{segment_name(segment_length)}", f"cv_count_{segment_name(segment_length)}"
