"""How large a cache of experts should be, what it costs and what it saves.

L layers with a cache each, K active of E experts of a layer, C = rho * K slots.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import mul

from consistency_reg.metrics.simulated_caches import ModelHitRates


@dataclass(frozen=True)
class CacheChoice:
    """A cache size for every layer and what comes of it.

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


def knee(sizes: Sequence[float], hit_rates: Sequence[float]) -> int | None:
    """Where a curve of hit rates bends: beyond it, slots bring less than they do on average.

    The point with the greatest height above the chord from the first point to the last, both axes scaled to 0..1
    ("Kneedle", Satopaa et al. 2011, for a curve that needs no smoothing); the smaller size on ties. The point is also
    the one at the greatest distance to the chord.

    Returns:
        The point's index; None where no point lies above the chord: such a curve has no knee.

    Example:
        >>> knee([1, 2, 3, 4], [0.2, 0.8, 0.9, 1.0])
        1
        >>> knee([1, 2, 3], [0.0, 0.5, 1.0])
    """
    width, height = sizes[-1] - sizes[0], hit_rates[-1] - hit_rates[0]
    if width <= 0 or height <= 0:
        return None
    above = [
        (rate - hit_rates[0]) / height - (size - sizes[0]) / width for size, rate in zip(sizes, hit_rates, strict=True)
    ]
    best = max(range(len(above)), key=above.__getitem__)
    return best if above[best] > 1e-9 else None  # rounding is no knee


def ratios(rates: ModelHitRates) -> list[float]:
    """Cache ratios that give the widest layer each of its sizes, from K slots to E: fewer cannot serve one token."""
    widest = max(rates.layers, key=lambda layer: len(layer.hit_rate) / layer.top_k)
    return [slots / widest.top_k for slots in range(widest.top_k, len(widest.hit_rate) + 1)]


def knee_ratio(rates: ModelHitRates) -> float | None:
    """The cache ratio at the knee of the mean of the layers' hit rates, from K slots to E; None where there is none."""
    sizes = ratios(rates)
    found = knee(sizes, [float(rates.at(ratio)) for ratio in sizes])
    return None if found is None else sizes[found]


def choose(rates: ModelHitRates, ratio: float, expert_bytes: Sequence[int] | None) -> CacheChoice:
    """What a cache of ``ratio`` times K slots for each layer costs and saves.

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
