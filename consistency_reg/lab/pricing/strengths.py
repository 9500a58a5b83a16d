"""Check the strengths of cache-aware routing that a command is given, before it reads a model."""

import math
from collections.abc import Sequence

from consistency_reg.functional.cache_aware import check_cache_aware


def check_strengths(strengths: Sequence[float], method: str = "prior") -> None:
    """Raise ValueError unless ``--cache-aware`` names strengths that the method takes.

    Args:
        strengths: of :class:`~consistency_reg.CacheAwareRouting`.
        method: "prior", "max_rank" or "cumulative".

    Example:
        >>> check_strengths([0.0, -0.1])
        Traceback (most recent call last):
        ValueError: --cache-aware must be strengths of 0 or more, got [0.0, -0.1]
    """
    if not strengths or not all(0 <= strength < math.inf for strength in strengths):
        raise ValueError(f"--cache-aware must be strengths of 0 or more, got {strengths}")
    for strength in strengths:
        check_cache_aware(1, 1, 1, strength, 1, method)
