"""The base of the metrics of simulated caches: hit rates of every size, summed over documents."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from consistency_reg.functional.bootstrap import percentile_interval
from consistency_reg.functional.cache_simulation import RowSums
from consistency_reg.measures.reading import Reading
from consistency_reg.metrics.base import Value, axes_of
from consistency_reg.metrics.resampled import ResampledMetric
from consistency_reg.routing import RoutingTrace

CHUNK_RATES = 2**22  # hit rates of rows that are in memory at a time


@dataclass(frozen=True)
class CacheHitRates:
    """Holds the hit rate of one cache for every size.

    Attributes:
        hit_rate: [E] float64, with 1, 2, ..., E slots; the mean over documents.
        top_k: accesses per token, K; those of all layers together for a shared cache.
        interval: [E, 2], 95% bootstrap interval; None where there was no bootstrap.
    """

    hit_rate: Tensor
    top_k: int
    interval: Tensor | None = None

    def slots(self, ratio: float) -> int:
        """Return the number of slots nearest to ``ratio * top_k``, at least 1 and at most E."""
        return min(max(round(ratio * self.top_k), 1), len(self.hit_rate))

    def at(self, ratio: float) -> Tensor:
        """Return the hit rate with ``ratio * top_k`` slots."""
        return self.hit_rate[self.slots(ratio) - 1]

    def interval_at(self, ratio: float) -> Tensor | None:
        """Return the [2] 95% interval of :meth:`at`; None where there was no bootstrap."""
        return None if self.interval is None else self.interval[self.slots(ratio) - 1]

    def at_share(self, share: float) -> Tensor:
        """Return the hit rate with ``share`` of all experts in the cache, rounded to whole slots, at least one."""
        return self.hit_rate[max(round(share * len(self.hit_rate)), 1) - 1]


@dataclass(frozen=True)
class ModelHitRates:
    """Holds the hit rates of a model.

    Attributes:
        layers: those of a cache for each layer.
        shared: those of one cache whose slots all layers share; None where it was not asked for.
        intervals: for each cache ratio of the metric the [2] 95% interval of :meth:`at`; empty without a bootstrap.
    """

    layers: tuple[CacheHitRates, ...]
    shared: CacheHitRates | None
    intervals: dict[float, Tensor]

    def at(self, ratio: float) -> Tensor:
        """Return the mean over layers of the hit rate of a cache of ``ratio`` times K slots for each layer."""
        return torch.stack([layer.at(ratio) for layer in self.layers]).mean()

    def at_share(self, share: float) -> Tensor:
        """Return the mean over layers of the hit rate with ``share`` of a layer's experts in its cache."""
        return torch.stack([layer.at_share(share) for layer in self.layers]).mean()

    @property
    def ratios(self) -> list[float]:
        """Return the cache ratios of 1, 2, ... slots of the layer with the most experts for an active one."""
        widest = max(self.layers, key=lambda layer: len(layer.hit_rate) / max(layer.top_k, 1))
        return [slots / max(widest.top_k, 1) for slots in range(1, len(widest.hit_rate) + 1)]

    def value(self, reading: Reading) -> Value:
        """Return the hit rate at the cache size that a reading of the table of measures names."""
        share, ratio = reading.share, reading.ratio
        if share is not None:
            return Value(reading, self.at_share(share), [layer.at_share(share) for layer in self.layers])
        assert ratio is not None
        return Value(reading, self.at(ratio), [layer.at(ratio) for layer in self.layers])


class HitRateMetric(ResampledMetric):
    """Base of the metrics that simulate caches of experts: the mean over documents of hit rates, for every size.

    Each layer has a cache of its own, and with ``shared`` there is one more whose slots all layers share. A shared
    cache of L layers has L times the accesses and L times the sizes: it costs about L times what all layers cost.

    Args:
        num_experts: E of each layer, in the model's order.
        names: of the simulations, as the scalars of ``compute()`` begin with.
        cache_ratios: cache sizes to give in ``compute()``, in units of K (of the layers' sum of K if shared).
        shared: simulate the shared cache too.
        replicates: bootstrap replicates for the 95% intervals; 0 for none.
        options: see :class:`~consistency_reg.metrics.resampled.ResampledMetric`.
    """

    higher_is_better = True
    tokens: Tensor
    accesses: Tensor
    documents: Tensor
    rates: Tensor
    resampled: Tensor
    resampled_documents: Tensor

    def __init__(
        self,
        num_experts: int | Sequence[int],
        names: Sequence[str],
        *,
        cache_ratios: Sequence[float] = (1, 2, 4),
        shared: bool = False,
        replicates: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(num_experts, replicates=replicates, **options)
        if not cache_ratios or not all(0 < ratio < math.inf for ratio in cache_ratios):
            raise ValueError(f"cache_ratios must be positive numbers, got {cache_ratios}")
        self.names = tuple(names)
        self.cache_ratios = tuple(cache_ratios)
        self.shared = shared
        experts = sum(self.num_experts)
        self.caches = (*self.num_experts, experts) if shared else self.num_experts  # how many sizes each cache has
        self.chunk_sequences = min(1024, max(1, CHUNK_RATES // (len(self.names) * sum(self.caches))))
        self._add_sum("tokens")
        self._add_sum("accesses", len(self.num_experts))
        self._add_sum("documents")
        self._add_sum("rates", len(self.names), sum(self.caches), dtype=torch.float64)
        if replicates:
            self._add_sum("resampled", replicates, len(self.names), sum(self.caches), dtype=torch.float64)
            self._add_sum("resampled_documents", replicates)

    def update(self, trace: RoutingTrace, sequence_index: Tensor | None = None) -> None:
        """Simulate the caches on a batch. On a GPU the host does not wait."""
        for part, index in self._numbered(trace, sequence_index):
            tokens = part.valid_mask.sum()
            self._add("tokens", tokens)
            self._add("accesses", torch.stack([tokens * layer.top_k for layer in part]))
            simulated = [self._simulate(name, part) for name in self.names]
            rates_NSC = torch.stack([torch.cat([cache.total for cache in caches], 1) for caches in simulated], 1)
            documents_N = simulated[0][0].documents
            self._add("rates", rates_NSC.sum(dim=0))
            self._add("documents", documents_N.sum())
            if self.replicates:
                self._add("resampled", self._resampled(rates_NSC, index))
                self._add("resampled_documents", self._resampled(documents_N[:, None], index)[:, 0])

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw the hit rate by cache ratio, of the layers' mean and the shared cache; return (figure, axes)."""
        results = self._by_name(self.results() if val is None else val)
        ax = axes_of(ax)
        for name, model in results.items():
            (line,) = ax.plot(model.ratios, [float(model.at(ratio)) for ratio in model.ratios], label=name)
            for ratio, interval in model.intervals.items():
                ax.vlines(ratio, *interval.tolist(), color=line.get_color(), linewidth=3)
            if model.shared is not None:
                slots = torch.arange(1, len(model.shared.hit_rate) + 1) / max(model.shared.top_k, 1)
                shared = {"color": line.get_color(), "linestyle": "--", "label": f"{name}, shared by all layers"}
                ax.plot(slots, model.shared.hit_rate.cpu(), **shared)
        ax.set(xlabel="cache ratio: slots / active experts", ylabel="hit rate")
        ax.legend()
        return ax.figure, ax

    def _row_rates(self, name: str, cache: RoutingTrace) -> RowSums:
        """Return the documents' hit rates in one simulation of one cache that all layers share, summed by row."""
        raise NotImplementedError

    def _by_name(self, results: Any) -> dict[str, ModelHitRates]:
        """Return the results of the subclass under the names of the simulations."""
        raise NotImplementedError

    def _hit_rates(self, rates: Tensor) -> Tensor:
        """Return the hit rates of every size [..., C] from the documents' mean of :meth:`_row_rates`."""
        return rates

    def _simulate(self, name: str, trace: RoutingTrace) -> list[RowSums]:
        """Simulate each layer's cache, then the shared one."""
        alike: dict[tuple[int, int], list[int]] = {}
        for i, layer in enumerate(trace):
            alike.setdefault((layer.num_experts, layer.top_k), []).append(i)
        rates: dict[int, RowSums] = {}
        N = trace.shape[0]
        for (E, _), layers in alike.items():
            below_each_other = RoutingTrace(
                [torch.cat([trace.expert_ids[i] for i in layers])],
                E,
                valid=None if trace.valid is None else trace.valid.repeat(len(layers), 1),
                document_ids=None if trace.document_ids is None else trace.document_ids.repeat(len(layers), 1),
            )
            together = self._row_rates(name, below_each_other)
            for place, i in enumerate(layers):
                rows = slice(place * N, (place + 1) * N)
                rates[i] = RowSums(together.total[rows], together.documents[rows])
        if self.shared:
            rates[len(trace)] = self._row_rates(name, trace)
        return [rates[i] for i in range(len(self.caches))]

    def _models(self) -> list[ModelHitRates]:
        """Return the hit rates of each simulation."""
        rates_SC = self._hit_rates(self.rates / self.documents.clamp_min(1))
        replicates: Sequence[Tensor | None] = [None] * len(self.names)
        if self._with_intervals:
            drawn_R11 = self.resampled_documents[:, None, None]
            mean_RSC = self.resampled / drawn_R11.clamp_min(1)
            replicates = self._hit_rates(mean_RSC.where(drawn_R11 > 0, torch.nan)).unbind(1)
        return [self._model(*simulation) for simulation in zip(rates_SC, replicates, strict=True)]

    def _model(self, rates_C: Tensor, replicates_RC: Tensor | None) -> ModelHitRates:
        top_k = (self.accesses // self.tokens.clamp_min(1)).tolist()
        intervals: Sequence[Tensor | None] = [None] * len(self.caches)
        if replicates_RC is not None:
            intervals = percentile_interval(replicates_RC.T).split(self.caches)
        accesses = [*top_k, sum(top_k)][: len(self.caches)]
        caches = [CacheHitRates(*cache) for cache in zip(rates_C.split(self.caches), accesses, intervals, strict=True)]
        layers = tuple(caches[: len(self.num_experts)])
        of_mean = {}
        if replicates_RC is not None:
            for ratio in self.cache_ratios:
                of_layers = zip(self._layer_experts, layers, strict=True)
                sizes = [experts.start + layer.slots(ratio) - 1 for experts, layer in of_layers]
                of_mean[ratio] = percentile_interval(replicates_RC[:, sizes].mean(dim=1))
        return ModelHitRates(layers, caches[-1] if self.shared else None, of_mean)

    def _scalars(self, results: Any) -> dict[str, Tensor]:
        scalars = {}
        for name, model in self._by_name(results).items():
            for ratio in self.cache_ratios:
                at = f"{name}_rho{ratio:g}"
                scalars[at] = model.at(ratio)
                if ratio in model.intervals:
                    scalars[f"{at}_low"], scalars[f"{at}_high"] = model.intervals[ratio]
                if model.shared is not None:
                    scalars[f"{at}_shared"] = model.shared.at(ratio)
                scalars |= self._by_layer(at, [layer.at(ratio) for layer in model.layers])
        return scalars
