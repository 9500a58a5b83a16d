"""Add up routing over batches and domains, and give the measures under the names that trackers group into panels.

``GROUP/MEASURE`` is of the model over all data; below it stand ``/layer_00`` for a layer and ``/NAME`` for a domain.
The names are those of :mod:`consistency_reg.measures`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from consistency_reg.distributed import world_size
from consistency_reg.functional.srp import ModelSRP
from consistency_reg.measures import HIT_RATE, SRP, usual_length
from consistency_reg.measures.reading import TRAINING, VALIDATION, Reading
from consistency_reg.metrics import CacheHitRate, RoutingBalance, SegmentRoutingPerformance
from consistency_reg.metrics.balance import ModelBalance
from consistency_reg.metrics.base import RoutingMetric, Value
from consistency_reg.metrics.simulated_caches import ModelHitRates
from consistency_reg.metrics.srp import srp_values
from consistency_reg.routing import RoutingTrace
from consistency_reg.tracking.experts import Expert, expert_rows

ROWS_AT_ONCE = 256  # simulated caches take a step for all rows at once: few rows cost nearly what many do


@dataclass(frozen=True)
class Measured:
    """Hold the measures of a model's routing.

    Attributes:
        model: those of the model over all domains, by name.
        layers: those of its layers, by name.
        domains: by domain those of the model on it, by name; empty where there is one domain.
        tokens: valid tokens of each domain that was seen.
        hit_rates: of an LRU cache for each layer, at every size.
        experts: one row for each expert.
        usage: for each layer [E] int64, the tokens that used each expert.
    """

    model: dict[str, Tensor]
    layers: dict[str, Tensor]
    domains: dict[str, dict[str, Tensor]]
    tokens: dict[str, int]
    hit_rates: ModelHitRates
    experts: list[Expert]
    usage: tuple[Tensor, ...]

    @property
    def parts(self) -> dict[str, Tensor]:
        """Return the measures of the layers, and those of the domains as ``NAME/DOMAIN``."""
        by_domain = self.domains.items()
        return self.layers | {f"{name}/{domain}": value for domain, of in by_domain for name, value in of.items()}


class _Metrics(nn.Module):
    """Holds the metrics of one domain: of layers of so many experts, at these segment lengths."""

    def __init__(self, num_experts: Sequence[int], segment_lengths: Sequence[int]) -> None:
        super().__init__()
        self.srp = SegmentRoutingPerformance(num_experts, segment_lengths)
        self.lru = CacheHitRate(num_experts, "lru")
        self.balance = RoutingBalance(num_experts, segment_lengths)

    @property
    def each(self) -> tuple[RoutingMetric, ...]:
        """Return the metrics, in the same order on every process."""
        return self.srp, self.lru, self.balance

    def update(self, trace: RoutingTrace) -> None:
        """Count a batch."""
        for metric in self.each:
            metric.update(trace)

    def merge(self, other: Self) -> None:
        """Count what another domain has counted."""
        for mine, its in zip(self.each, other.each, strict=True):
            mine.merge_state(its)

    def results(self) -> "_Results":
        """Return the results over all processes."""
        return _Results(self.srp.results(), self.lru.results(), self.balance.results())


@dataclass(frozen=True)
class _Results:
    """Holds the results of the metrics of a domain."""

    srp: dict[int, ModelSRP]
    lru: ModelHitRates
    balance: ModelBalance


class RoutingMeasures:
    """Add up routing domain by domain: SRP, the hit rates of LRU caches, balance.

    Args:
        segment_lengths: m of SRP and of local balance.
        cache_ratios: rho of the caches, slots = rho * K.
        cache_shares: more caches, as a share of a layer's experts.

    Example:
        >>> measures = RoutingMeasures(segment_lengths=(2,), cache_ratios=(1.0,), cache_shares=())
        >>> measures.add(RoutingTrace([torch.tensor([[[0], [0], [1], [1]]])], num_experts=2))
        >>> measured = measures.results(["all"])
        >>> assert measured is not None
        >>> {name: round(float(value), 3) for name, value in measured.model.items() if "/" not in name or "k" in name}
        {'static_srp': 0.667, 'overlap': 0.667, 'cache/lru_k': 0.75}
    """

    def __init__(
        self, segment_lengths: Sequence[int], cache_ratios: Sequence[float], cache_shares: Sequence[float]
    ) -> None:
        self.segment_lengths = tuple(segment_lengths)
        self.cache_ratios = tuple(cache_ratios)
        self.cache_shares = tuple(cache_shares)
        self._domains: dict[int, _Metrics] = {}
        self._waiting: dict[int, list[RoutingTrace]] = {}

    @property
    def usual_length(self) -> int:
        """Return the segment length m for which single numbers are given."""
        return usual_length(self.segment_lengths)

    @property
    def srp(self) -> Reading:
        """Return the reading of SRP where one number is given."""
        return SRP.at(self.usual_length)

    @property
    def cache(self) -> Reading | None:
        """Return the reading of the hit rate where one number is given: the first share, else the largest ratio."""
        if self.cache_shares:
            return HIT_RATE.at(share=self.cache_shares[0])
        return HIT_RATE.at(ratio=max(self.cache_ratios)) if self.cache_ratios else None

    @property
    def headline_names(self) -> tuple[str, ...]:
        """Return the names of the two measures that progress bars show: SRP, and the hit rate of one cache."""
        return tuple(reading.name for reading in (self.srp, self.cache) if reading is not None)

    @property
    def trade_off_names(self) -> dict[str, str]:
        """Return the names of the trade-off by :meth:`headline`'s names: "srp_m16" and "misses_25pct"."""
        cache = dict(self.cache.parts)["size"] if self.cache else ""
        return {"SRP": self.srp.name.replace("/", "_"), "misses": f"misses_{cache}"}

    def headline(self, model: Mapping[str, Tensor]) -> dict[str, float]:
        """Return ``SRP`` and ``misses``, as shares, from the measures of a model; what it has of them."""
        shown = {"SRP": float(model[self.srp.name])} if self.srp.name in model else {}
        if self.cache is not None:
            shown["misses"] = 1 - float(model[self.cache.name])
        return shown

    def add(self, trace: RoutingTrace, domain: int = 0) -> None:
        """Count a batch of a domain; it may wait until there are enough rows to measure at once."""
        trace = replace(trace, scores=None, logits=None, inputs=None)
        waiting = self._waiting.setdefault(domain, [])
        if waiting and (waiting[0].shape[1] != trace.shape[1] or len(waiting) * waiting[0].shape[0] >= ROWS_AT_ONCE):
            self._measure(domain)
        self._waiting[domain].append(trace)

    def forget(self) -> None:
        """Forget all that was added."""
        self._domains, self._waiting = {}, {}

    def results(self, names: Sequence[str], device: torch.device | str = "cpu") -> Measured | None:
        """Return the measures of all that was added, over all processes, and forget it; None where nothing was.

        Args:
            names: of the domains, by their number.
            device: of the metrics of a domain that other processes alone have seen.
        """
        for domain in self._waiting:
            self._measure(domain)
        seen, num_experts = _of_all_processes(self._domains)
        metrics = {
            names[domain]: self._domains.get(domain) or _Metrics(num_experts, self.segment_lengths).to(device)
            for domain in sorted(seen)
        }
        self.forget()
        if not metrics:
            return None
        by_domain = {name: of_domain.results() for name, of_domain in metrics.items()}
        total, *others = metrics.values()
        for other in others:
            total.merge(other)
        return self._measured(total.results() if others else by_domain[names[min(seen)]], by_domain)

    def of_batch(self, trace: RoutingTrace) -> dict[str, Tensor]:
        """Return what is logged in training: SRP, static SRP, local gain and cache hits of the model on one batch.

        The batch is one of this process, and is not added.
        """
        options = {"check_values": False, "sync_on_compute": False}
        srp = SegmentRoutingPerformance.from_trace(trace, self.segment_lengths, **options)
        lru = CacheHitRate.from_trace(trace, "lru", **options)
        for metric in (srp, lru):
            metric.update(trace)
        return _of_model(self._values(srp_values(srp.results()), lru.results(), TRAINING))

    def _measured(self, total: _Results, by_domain: Mapping[str, _Results]) -> Measured:
        values = self._of_validation(total)
        several = by_domain if len(by_domain) > 1 else {}
        usage = {name: results.balance.usage for name, results in several.items()}
        srp_of_experts = [layer.per_expert for layer in total.srp[self.usual_length].layers]
        return Measured(
            model=_of_model(values),
            layers={
                value.reading.within(layer=index).name: of_layer
                for value in values
                for index, of_layer in enumerate(value.logged_layers)
            },
            domains={name: _of_model(self._of_validation(results)) for name, results in several.items()},
            tokens={name: int(results.balance.tokens) for name, results in by_domain.items()},
            hit_rates=total.lru,
            experts=expert_rows(total.balance.usage, srp_of_experts, usage),
            usage=total.balance.counts,
        )

    def _measure(self, domain: int) -> None:
        """Add the batches that wait to their domain."""
        trace = _below_each_other(self._waiting[domain])
        self._waiting[domain] = []
        if domain not in self._domains:
            num_experts = [layer.num_experts for layer in trace]
            self._domains[domain] = _Metrics(num_experts, self.segment_lengths).to(trace.expert_ids[0].device)
        self._domains[domain].update(trace)

    def _of_validation(self, results: _Results) -> list[Value]:
        return self._values([*srp_values(results.srp), *results.balance.values()], results.lru, VALIDATION)

    def _values(self, measured: Iterable[Value], lru: ModelHitRates, stage: str) -> list[Value]:
        """Return what is logged in a stage, without an m that every document was too short for: its SRP is 0."""
        sizes = [HIT_RATE.at(ratio=ratio) for ratio in self.cache_ratios]
        sizes += [HIT_RATE.at(share=share) for share in self.cache_shares]
        values = [*measured, *map(lru.value, sizes)]
        too_long = {value.reading.m for value in values if value.reading.measure is SRP and not value.model}
        return [
            value
            for value in values
            if stage in value.reading.measure.stages and (value.reading.m is None or value.reading.m not in too_long)
        ]


def _of_model(values: Sequence[Value]) -> dict[str, Tensor]:
    """Return the model's values by name."""
    return {value.reading.name: value.model for value in values}


def _of_all_processes(domains: Mapping[int, _Metrics]) -> tuple[set[int], Sequence[int]]:
    """Return the domains that some process has seen, and E of each layer.

    Metrics are synchronized one after the other, so that all processes must have the same.
    """
    num_experts = next((metrics.srp.num_experts for metrics in domains.values()), ())
    found = [(set(domains), num_experts)]
    if (processes := world_size()) > 1:
        found *= processes
        dist.all_gather_object(found, (set(domains), num_experts))
    return set().union(*(seen for seen, _ in found)), max(experts for _, experts in found)


def _below_each_other(traces: Sequence[RoutingTrace]) -> RoutingTrace:
    """Return batches of the same row length as one."""
    first = traces[0]
    some_padding = any(trace.valid is not None for trace in traces)
    valid = torch.cat([trace.valid_mask for trace in traces]) if some_padding else None
    document_ids = None
    if any(trace.document_ids is not None for trace in traces):
        whole_row = torch.zeros_like(first.valid_mask, dtype=torch.int64)[:1]
        document_ids = torch.cat(
            [whole_row.expand(trace.shape) if trace.document_ids is None else trace.document_ids for trace in traces]
        )
    layers = zip(*(trace.expert_ids for trace in traces), strict=True)
    return replace(first, expert_ids=[torch.cat(ids) for ids in layers], valid=valid, document_ids=document_ids)
