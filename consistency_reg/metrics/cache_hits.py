"""Hit rates of a model's expert caches as metrics: SCH, and the policies of real caches."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from consistency_reg.cache_policies import check_policy
from consistency_reg.functional.balance import usage_counts
from consistency_reg.functional.cache_hits import most_used
from consistency_reg.functional.cache_simulation import RowSums, Simulation, row_hit_rates, row_use_shares
from consistency_reg.functional.segments import check_segment_lengths
from consistency_reg.metrics.simulated_caches import HitRateMetric, ModelHitRates
from consistency_reg.routing import RoutingTrace


class SegmentCacheHitRate(HitRateMetric):
    """Measures SCH by cache size and segment length, of each layer and of a cache that all layers share.

    ``compute()`` gives ``sch_m16_rho2``, the mean over the layers with 2K slots each, ``sch_m16_rho2_layer_00`` of
    each layer, ``sch_m16_rho2_shared`` of a shared cache with twice the K of all layers together, and with a bootstrap
    ``sch_m16_rho2_low`` and ``_high``. ``results()`` gives a :class:`ModelHitRates` for each m, with every cache size.
    See :mod:`consistency_reg.functional.sch` for what is measured.

    Args:
        num_experts: E of each layer, in the model's order.
        segment_lengths: the m.
        options: see :class:`~consistency_reg.metrics.simulated_caches.HitRateMetric`.

    Example:
        >>> metric = SegmentCacheHitRate([3], segment_lengths=[3], cache_ratios=[1])
        >>> metric.update(RoutingTrace([torch.tensor([[[0, 1], [0, 2], [0, 1], [0, 2]]])], num_experts=3))
        >>> {name: float(value) for name, value in metric.compute().items()}
        {'sch_m3_rho1': 0.625, 'sch_m3_rho1_layer_00': 0.625}
    """

    def __init__(
        self, num_experts: int | Sequence[int], segment_lengths: int | Sequence[int] = (4, 16, 64), **options: Any
    ) -> None:
        lengths = check_segment_lengths(segment_lengths)
        super().__init__(num_experts, [f"sch_m{m}" for m in lengths], **options)
        self.segment_lengths = dict(zip(self.names, lengths, strict=True))

    def _row_rates(self, name: str, cache: RoutingTrace) -> RowSums:
        return row_hit_rates(cache, Simulation("sch", self.segment_lengths[name]))

    def _results(self) -> dict[int, ModelHitRates]:
        return dict(zip(self.segment_lengths.values(), self._models(), strict=True))

    def _by_name(self, results: dict[int, ModelHitRates]) -> dict[str, ModelHitRates]:
        return {f"sch_m{m}": model for m, model in results.items()}


class CacheHitRate(HitRateMetric):
    """Measures the hit rate of a real cache policy by cache size, of each layer and of a cache that all layers share.

    ``compute()`` gives ``lru_rho2`` and so on, as :class:`SegmentCacheHitRate` does; ``results()`` gives a
    :class:`ModelHitRates`. The fixed set is the most used experts of all data that the metric has seen, also in its
    intervals. See :mod:`consistency_reg.functional.cache_hits` for what is measured.

    Args:
        num_experts: E of each layer, in the model's order.
        policy: "lru", "lfu", "belady" or "fixed".
        replay: "token" or "access"; see :func:`~consistency_reg.functional.cache_hits.cache_hit_rate`.
        cold: whether first uses are hits ("free") or misses ("miss").
        options: see :class:`~consistency_reg.metrics.simulated_caches.HitRateMetric`.

    Example:
        >>> metric = CacheHitRate([3], policy="lru", cache_ratios=[1])
        >>> metric.update(RoutingTrace([torch.tensor([[[0, 1], [0, 2], [0, 1], [0, 2]]])], num_experts=3))
        >>> {name: float(value) for name, value in metric.compute().items()}
        {'lru_rho1': 0.625, 'lru_rho1_layer_00': 0.625}
    """

    usage: Tensor

    def __init__(
        self,
        num_experts: int | Sequence[int],
        policy: str = "lru",
        *,
        replay: str = "token",
        cold: str = "free",
        **options: Any,
    ) -> None:
        check_policy(policy)
        self.simulation = Simulation("lru" if policy == "fixed" else policy, replay=replay, cold=cold)
        super().__init__(num_experts, [policy], **options)
        self.policy = policy
        if policy == "fixed":
            self._add_sum("usage", sum(self.num_experts))

    def update(self, trace: RoutingTrace, sequence_index: Tensor | None = None) -> None:
        """Simulate the caches on a batch."""
        super().update(trace, sequence_index)
        if self.policy == "fixed":
            usage = [usage_counts(layer.expert_ids, layer.num_experts, trace.valid) for layer in trace]
            self._add("usage", torch.cat(usage))

    def _row_rates(self, name: str, cache: RoutingTrace) -> RowSums:
        # The fixed set is not known before all data is seen: count each expert by itself, and choose at the end.
        return row_use_shares(cache) if self.policy == "fixed" else row_hit_rates(cache, self.simulation)

    def _hit_rates(self, rates: Tensor) -> Tensor:
        if self.policy != "fixed":
            return rates
        usage = [self.usage[experts] for experts in self._layer_experts] + [self.usage] * self.shared
        of_caches = zip(rates.split(self.caches, dim=-1), map(most_used, usage), strict=True)
        return torch.cat([of_experts[..., order].cumsum(dim=-1) for of_experts, order in of_caches], dim=-1)

    def _results(self) -> ModelHitRates:
        return self._models()[0]

    def _by_name(self, results: ModelHitRates) -> dict[str, ModelHitRates]:
        return {self.policy: results}
