"""Advice on the size of a cache of experts: what it costs and what it saves.

L layers with a cache each, K active of E experts of a layer, C = rho * K slots.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import mul

from consistency_reg.lab.knee import knee
from consistency_reg.metrics.simulated_caches import ModelHitRates


@dataclass(frozen=True)
class CacheChoice:
    """Holds a cache size for every layer and what comes of it.

    Attributes:
        ratio: rho, slots / K.
        slots: of each layer's cache.
        hit_rate: mean of the layers.
        misses: experts that a token has to load, in all layers together.
        memory_bytes: fast memory of all slots; None where the size of an expert is not known.
        loaded_bytes: what a token has to load in all layers together; None likewise.
    """

    ratio: float
    slots: tuple[int, ...]
    hit_rate: float
    misses: float
    memory_bytes: int | None
    loaded_bytes: float | None


def ratios(rates: ModelHitRates) -> list[float]:
    """Return the cache ratios of every size of the widest layer, from K slots, which one token needs, to E."""
    return [ratio for ratio in rates.ratios if ratio >= 1]


def knee_ratio(rates: ModelHitRates) -> float | None:
    """Return the cache ratio at the knee of the layers' mean hit rates, from K slots to E; None where there is none."""
    sizes = ratios(rates)
    found = knee(sizes, [float(rates.at(ratio)) for ratio in sizes])
    return None if found is None else sizes[found]


def choose(rates: ModelHitRates, ratio: float, expert_bytes: Sequence[int] | None) -> CacheChoice:
    """Return what a cache of ``ratio`` times K slots for each layer costs and saves.

    A token misses ``K (1 - hit rate)`` experts of a layer. First loads into slots that are still free are hits by the
    rules of counting, so that a device loads a little more at the start of a document.

    Args:
        rates: of the cache's policy.
        ratio: rho.
        expert_bytes: of one expert of each layer; None where that is not known.
    """
    slots = tuple(layer.slots(ratio) for layer in rates.layers)
    misses = [layer.top_k * (1 - float(layer.at(ratio))) for layer in rates.layers]
    return CacheChoice(
        ratio=ratio,
        slots=slots,
        hit_rate=float(rates.at(ratio)),
        misses=sum(misses),
        memory_bytes=None if expert_bytes is None else sum(map(mul, slots, expert_bytes)),
        loaded_bytes=None if expert_bytes is None else sum(map(mul, misses, expert_bytes)),
    )
