"""How many slots a number of bytes pays for, and how to spread them over the layers."""

import re
from collections.abc import Sequence

UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_bytes(text: str | int | float, name: str = "memory") -> int:
    """Return a number of bytes.

    Args:
        text: such as 2000000000, "2GB" or "1.5 GiB".
        name: what the user calls it.

    Raises:
        ValueError: it is none of these, or not positive.

    Example:
        >>> parse_bytes("2GB"), parse_bytes("1.5 MiB")
        (2000000000, 1572864)
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", str(text))
    if found is None or found[2].lower() not in UNITS or not float(found[1]) > 0:
        raise ValueError(f"{name} must be a positive number of bytes such as 500MB, 2GB or 1.5GiB, got {text!r}")
    return int(float(found[1]) * UNITS[found[2].lower()])


def parse_bandwidth(text: str | int | float, name: str = "read_bandwidth") -> int:
    """Return a number of bytes per second, given with or without "/s".

    Example:
        >>> parse_bandwidth("1.5GB/s"), parse_bandwidth("300MB")
        (1500000000, 300000000)
    """
    return parse_bytes(str(text).strip().removesuffix("/s"), name)


def show_bytes(number: float) -> str:
    """Return a number of bytes as people write it.

    Example:
        >>> show_bytes(1_179_648), show_bytes(500)
        ('1.18 MB', '500 B')
    """
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f} B"


def equal_slots(available: int, expert_bytes: Sequence[int], most: Sequence[int]) -> int:
    """Return the largest number of slots that every layer can have, 0 where not even one fits.

    Args:
        available: bytes for all slots.
        expert_bytes: of one expert of each layer.
        most: E of each layer.

    Example:
        >>> equal_slots(100, [10, 10], [8, 8])
        5
    """
    return max(0, min(available // sum(expert_bytes), max(most)))


def spread_slots(
    hits: Sequence[Sequence[float]], expert_bytes: Sequence[int], available: int, least: Sequence[int]
) -> list[int]:
    """Return the slots of each layer that bring the most hits for a number of bytes.

    Each step gives slots to the layer where hits per byte rise the most, looking past flat parts of a curve: of all
    larger sizes of a layer the one with the steepest way to it counts. Greedy on the upper hull of each curve, which
    is optimal up to the last step.

    Args:
        hits: for each layer the measured hits with 1, 2, ..., E slots.
        expert_bytes: of one expert of each layer.
        available: bytes for all slots.
        least: slots that each layer has in any case, K.

    Raises:
        ValueError: not even the least fits.

    Example: the second layer's hits come late, but steeply

        >>> spread_slots([[1, 2, 2, 2], [0, 0, 9, 9]], [10, 10], 40, [1, 1])
        [1, 3]
    """
    slots = list(least)
    left = available - sum(number * size for number, size in zip(slots, expert_bytes, strict=True))
    if left < 0:
        raise ValueError(
            f"{available} bytes do not hold the least of {list(least)} slots: {-left} bytes more are needed"
        )
    while True:
        steps = [
            ((curve[to - 1] - curve[slots[layer] - 1]) / ((to - slots[layer]) * expert_bytes[layer]), -to, layer)
            for layer, curve in enumerate(hits)
            for to in range(slots[layer] + 1, len(curve) + 1)
            if (to - slots[layer]) * expert_bytes[layer] <= left
        ]
        if not steps:
            return slots
        _, minus_to, layer = max(steps)
        left -= (-minus_to - slots[layer]) * expert_bytes[layer]
        slots[layer] = -minus_to
