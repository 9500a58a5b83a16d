"""Decide how many slots each layer gets, before anything is loaded."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

from consistency_reg.byte_sizes import parse_bytes, show_bytes
from consistency_reg.offload.budget import equal_slots, spread_slots
from consistency_reg.offload.layers import ExpertLayer

SPREADS = ("equal", "shared", "auto")


@dataclass(frozen=True)
class Need:
    """States what a model needs of fast memory.

    Attributes:
        layers: of experts.
        top_k: K; None where the configuration does not tell.
        expert_bytes: of one expert of each layer as it lies in a slot.
        dense_bytes: of all other weights.
        extra_bytes: of buffers for reading, and of the experts that are read ahead.
    """

    layers: Sequence[ExpertLayer]
    top_k: int | None
    expert_bytes: Sequence[int]
    dense_bytes: int
    extra_bytes: int

    @property
    def least_bytes(self) -> int:
        """The bytes without which the model does not run: K slots a layer beside everything else."""
        return self.dense_bytes + self.extra_bytes + (self.top_k or 1) * sum(self.expert_bytes)


def plan_slots(
    need: Need,
    *,
    cache_ratio: float,
    slots: int | Sequence[int] | None,
    memory: str | int | None,
    spread: str,
    curves: Sequence[Sequence[float]] | None,
) -> list[int]:
    """Return the slots of each layer; their sum is what a shared cache has.

    Raises:
        ValueError: two budgets at once, a budget that does not fit the model, an unknown spread, curves that are
            missing or not those of the layers.
    """
    if spread not in SPREADS:
        raise ValueError(f"spread must be one of {', '.join(SPREADS)}, got {spread!r}")
    if slots is not None and memory is not None:
        raise ValueError("slots and memory are two budgets: give one of them")
    if (spread == "auto") != (curves is not None):
        raise ValueError("spread='auto' goes with the measured curves of the layers: give both or neither")
    if spread == "shared" and len({tuple(layer.shapes.items()) for layer in need.layers}) > 1:
        raise ValueError("spread='shared' needs experts of one shape, and this model's layers differ")
    L, least = len(need.layers), need.top_k or 1
    if isinstance(slots, Sequence):
        if len(slots) != L:
            raise ValueError(f"slots must be one number or one for each of {L} layers, got {len(slots)}")
        return _checked(need, slots)
    if curves is not None:
        _check_curves(need, curves)
        available = _available(need, cache_ratio, slots, memory)
        return _checked(need, spread_slots(curves, need.expert_bytes, available, [least] * L))
    if memory is None:
        number = _number(need, cache_ratio, slots)
    else:
        most = [layer.num_experts for layer in need.layers]
        number = equal_slots(_available(need, cache_ratio, slots, memory), need.expert_bytes, most)
    return _checked(need, [number] * L)


def _number(need: Need, cache_ratio: float, slots: int | None) -> int:
    """Return the slots of a layer, rounded as those of :class:`~consistency_reg.CacheAwareRouting`."""
    if slots is not None:
        return slots
    if not (isinstance(cache_ratio, int | float) and 0 < cache_ratio < math.inf):
        raise ValueError(f"cache_ratio must be a positive number of slots per active expert, got {cache_ratio!r}")
    if need.top_k is None:
        raise ValueError("the model's configuration does not tell how many experts are active: give slots or memory")
    return round(cache_ratio * need.top_k)


def _available(need: Need, cache_ratio: float, slots: int | None, memory: str | int | None) -> int:
    """Return the bytes for slots."""
    if memory is None:
        return _number(need, cache_ratio, slots) * sum(need.expert_bytes)
    budget = parse_bytes(memory)
    if budget < need.least_bytes:
        raise ValueError(
            f"memory must be at least {show_bytes(need.least_bytes)} for this model, got {show_bytes(budget)}: "
            f"{show_bytes(need.dense_bytes)} for the weights that are always there, {show_bytes(need.extra_bytes)} for "
            f"reading, and {show_bytes((need.top_k or 1) * sum(need.expert_bytes))} for {need.top_k or 1} slots a layer"
        )
    return budget - need.dense_bytes - need.extra_bytes


def _checked(need: Need, slots: Sequence[int]) -> list[int]:
    """Return the slots, at most one for each expert; ValueError where they are fewer than a token needs."""
    least = need.top_k or 1
    for number in slots:
        if not isinstance(number, Integral):
            raise ValueError(f"slots must be whole numbers of experts, got {number!r}")
        if number < least:
            raise ValueError(f"slots must be at least {least}, the experts that are active per token, got {number}")
    return [min(number, layer.num_experts) for layer, number in zip(need.layers, slots, strict=True)]


def _check_curves(need: Need, curves: Sequence[Sequence[float]]) -> None:
    wanted, got = [layer.num_experts for layer in need.layers], [len(curve) for curve in curves]
    if wanted != got:
        raise ValueError(f"curves must hold the hits of 1 to E slots for layers with E = {wanted}, got lengths {got}")
