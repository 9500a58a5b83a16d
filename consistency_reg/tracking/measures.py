"""The measures of routing over some domains, under the names that trackers group into panels.

``GROUP/MEASURE`` is of the model over all data; below it stand ``/layer_00`` for a layer and ``/NAME`` for a domain.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from consistency_reg.losses.distributed import world_size
from consistency_reg.metrics import CacheHitRate, RoutingBalance, SegmentRoutingPerformance
from consistency_reg.metrics.base import RoutingMetric
from consistency_reg.metrics.simulated_caches import ModelHitRates
from consistency_reg.routing import RoutingTrace
from consistency_reg.tracking.experts import Expert, expert_rows

ROWS_AT_ONCE = 256  # simulated caches take a step for all rows at once: few rows cost nearly what many do
USUAL_LENGTH = 16  # the m of single numbers, if it is among the segment lengths


@dataclass(frozen=True)
class Measured:
    """What was measured.

    Attributes:
        model: the measures of the model over all domains, by name.
        parts: those of its layers, and of each domain if there are several.
        hit_rates: of an LRU cache for each layer, at every size.
        experts: one row for each expert.
    """

    model: dict[str, Tensor]
    parts: dict[str, Tensor]
    hit_rates: ModelHitRates
    experts: list[Expert]


class RoutingMeasures:
    """Adds up routing domain by domain: SRP, the hit rates of LRU caches, balance.

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
        self._domains: dict[int, dict[str, RoutingMetric]] = {}
        self._waiting: dict[int, list[RoutingTrace]] = {}

    @property
    def usual_length(self) -> int:
        """The m of what is told for one segment length."""
        return min(self.segment_lengths, key=lambda m: (abs(m - USUAL_LENGTH), m))

    @property
    def usual_cache(self) -> str | None:
        """The cache of what is told for one: the first share of the experts, else the largest ratio."""
        if self.cache_shares:
            return _share_name(self.cache_shares[0])
        return ratio_name(max(self.cache_ratios)) if self.cache_ratios else None

    @property
    def headline_names(self) -> tuple[str, ...]:
        """The measures of a model that say most: SRP, and the hit rate of one cache."""
        return f"srp/m{self.usual_length}", *([f"cache/lru_{self.usual_cache}"] if self.usual_cache else [])

    def headline(self, model: Mapping[str, Tensor]) -> dict[str, float]:
        """``SRP`` and ``misses``, as shares, from the measures of a model; what it has of them."""
        srp, *cache = self.headline_names
        shown = {"SRP": float(model[srp])} if srp in model else {}
        if cache:
            shown["misses"] = 1 - float(model[cache[0]])
        return shown

    def add(self, trace: RoutingTrace, domain: int = 0) -> None:
        """Count a batch of a domain; it may wait until there are enough rows to measure at once."""
        trace = replace(trace, scores=None, logits=None, inputs=None)
        waiting = self._waiting.setdefault(domain, [])
        if waiting and (waiting[0].shape[1] != trace.shape[1] or len(waiting) * waiting[0].shape[0] >= ROWS_AT_ONCE):
            self._measure(domain)
        self._waiting[domain].append(trace)

    def results(self, names: Sequence[str], device: torch.device | str = "cpu") -> Measured | None:
        """All that was added, over all processes, and forget it; None where nothing was.

        Args:
            names: of the domains, by their number.
            device: of the metrics of a domain that other processes alone have seen.
        """
        for domain in self._waiting:
            self._measure(domain)
        seen, num_experts = _of_all_processes(self._domains)
        domains = {
            domain: self._domains.get(domain) or self._new_metrics(num_experts, device) for domain in sorted(seen)
        }
        self._domains, self._waiting = {}, {}
        if not domains:
            return None
        parts: dict[str, Tensor] = {}
        usage = {names[index]: metrics["balance"].results().usage for index, metrics in domains.items()}
        if len(domains) > 1:
            for index, metrics in domains.items():
                model, _ = self._values(metrics, metrics["lru"].results())
                parts |= {f"{name}/{names[index]}": value for name, value in model.items()}
        total, *others = domains.values()
        for other in others:
            for name, metric in total.items():
                metric.merge_state(other[name])
        rates = total["lru"].results()
        model, layers = self._values(total, rates)
        srp = [layer.per_expert for layer in total["srp"].results()[self.usual_length].layers]
        experts = expert_rows(total["balance"].results().usage, srp, usage if len(domains) > 1 else {})
        return Measured(model, layers | parts, rates, experts)

    def of_batch(self, trace: RoutingTrace) -> dict[str, Tensor]:
        """SRP, static SRP, local gain and cache hits of the model on one batch of this process, which is not added."""
        options = {"check_values": False, "sync_on_compute": False}
        srp = SegmentRoutingPerformance.from_trace(trace, self.segment_lengths, **options)
        lru = CacheHitRate.from_trace(trace, "lru", **options)
        for metric in (srp, lru):
            metric.update(trace)
        values = self._of_whole_segments({log_name(key): value for key, value in srp.compute().items()})
        values |= cache_values(lru.results(), self.cache_ratios, self.cache_shares)
        kept = ("srp/", "static_srp", "local_gain/", "cache/")
        return {name: value for name, value in values.items() if name.startswith(kept) and "/layer_" not in name}

    def _measure(self, domain: int) -> None:
        """Add the batches that wait to their domain."""
        trace = _below_each_other(self._waiting[domain])
        self._waiting[domain] = []
        if domain not in self._domains:
            num_experts = [layer.num_experts for layer in trace]
            self._domains[domain] = self._new_metrics(num_experts, trace.expert_ids[0].device)
        for metric in self._domains[domain].values():
            metric.update(trace)

    def _new_metrics(self, num_experts: Sequence[int], device: torch.device | str) -> dict[str, RoutingMetric]:
        """Those of a domain."""
        metrics: dict[str, RoutingMetric] = {
            "srp": SegmentRoutingPerformance(num_experts, self.segment_lengths),
            "balance": RoutingBalance(num_experts, self.segment_lengths),
            "lru": CacheHitRate(num_experts, "lru"),
        }
        return {name: metric.to(device) for name, metric in metrics.items()}

    def _values(
        self, metrics: dict[str, RoutingMetric], rates: ModelHitRates
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(those of the model, those of its layers)."""
        values = {log_name(key): value for name in ("srp", "balance") for key, value in metrics[name].compute().items()}
        values = self._of_whole_segments(values)
        values |= cache_values(rates, self.cache_ratios, self.cache_shares)
        of_layer = {name for name in values if "/layer_" in name}
        return {n: values[n] for n in values if n not in of_layer}, {n: values[n] for n in values if n in of_layer}

    def _of_whole_segments(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Without the measures of an m that every document was too short for: there, and nowhere else, SRP is 0."""
        absent = {f"m{m}" for m in self.segment_lengths if not values[f"srp/m{m}"]}
        return {name: value for name, value in values.items() if not absent & set(name.split("/"))}


def _of_all_processes(domains: Mapping[int, Mapping[str, RoutingMetric]]) -> tuple[set[int], Sequence[int]]:
    """The domains that some process has seen, and E of each layer: metrics are synchronized one after the other."""
    num_experts = next((metrics["srp"].num_experts for metrics in domains.values()), ())
    found = [(set(domains), num_experts)]
    if (processes := world_size()) > 1:
        found *= processes
        dist.all_gather_object(found, (set(domains), num_experts))
    return set().union(*(seen for seen, _ in found)), max(experts for _, experts in found)


def cache_values(
    rates: ModelHitRates, cache_ratios: Sequence[float], cache_shares: Sequence[float]
) -> dict[str, Tensor]:
    """LRU hit rates by cache size: ``cache/lru_2k`` with 2K slots, ``cache/lru_25pct`` with a share of the experts."""
    by_layer = {ratio_name(ratio): [layer.at(ratio) for layer in rates.layers] for ratio in cache_ratios}
    by_layer |= {_share_name(share): [layer.at_share(share) for layer in rates.layers] for share in cache_shares}
    values = {}
    for name, layers in by_layer.items():
        values[f"cache/lru_{name}"] = torch.stack(layers).mean()
        values |= {f"cache/lru_{name}/layer_{index:02d}": rate for index, rate in enumerate(layers)}
    return values


def ratio_name(ratio: float) -> str:
    """How the name of a cache of ``ratio`` times K slots ends.

    Example:
        >>> ratio_name(1.0), ratio_name(1.5)
        ('k', '1.5k')
    """
    return f"{'' if ratio == 1 else f'{ratio:g}'}k"


def _share_name(share: float) -> str:
    return f"{100 * share:g}pct"


def _below_each_other(traces: Sequence[RoutingTrace]) -> RoutingTrace:
    """Batches of the same row length as one."""
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


def log_name(key: str) -> str:
    """From a metric's key to a name that loggers group: ``srp_m16_layer_00`` -> ``srp/m16/layer_00``."""
    key = re.sub(r"_(layer_\d+)$", r"/\1", key)
    key = re.sub(r"_(m\d+|document)(/|$)", r"/\1\2", key)
    key = key.replace("max_over_mean", "max_mean").replace("size_ratio", "rho_hat")
    return key.replace("local_cv", "balance/local_cv").replace("balance_", "balance/")
