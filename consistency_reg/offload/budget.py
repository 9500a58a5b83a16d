"""Turn a number of bytes into slots, and spread them over the layers."""

from collections.abc import Sequence


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
