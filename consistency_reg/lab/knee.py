"""Find the cache size at which a curve of hit rates bends."""

from collections.abc import Sequence


def knee(sizes: Sequence[float], hit_rates: Sequence[float]) -> int | None:
    """Return the index of the cache size beyond which slots bring less than they do on average.

    This is the point with the greatest height above the chord from the first point to the last, both axes scaled to
    0..1 ("Kneedle", Satopaa et al. 2011, for a curve that needs no smoothing); the smaller size on ties. It is also the
    point at the greatest distance to the chord.

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
