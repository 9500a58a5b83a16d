"""The fast memory: buffers that each hold one expert, and which expert is in which."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from consistency_reg.offload.cache import ExpertCache, replay
from consistency_reg.offload.layers import ExpertLayer
from consistency_reg.offload.stores import Store

Key = tuple[int, int]  # layer, expert


class Slots:
    """Buffers for the experts of layers of one shape.

    Args:
        layer: one of these layers.
        number: of buffers.
        dtype: of the weights.
        device: of the buffers.

    Attributes:
        free: buffers without an expert.
    """

    def __init__(self, layer: ExpertLayer, number: int, dtype: torch.dtype, device: torch.device) -> None:
        self._weights = {
            name: torch.empty((number, *shape), dtype=dtype, device=device) for name, shape in layer.shapes.items()
        }
        self.number = number
        self.clear()

    @property
    def nbytes(self) -> int:
        """The bytes of all buffers."""
        return sum(weight.nbytes for weight in self._weights.values())

    def rows(self, buffer: int) -> dict[str, Tensor]:
        """Return the weights that a buffer holds."""
        return {name: weight[buffer] for name, weight in self._weights.items()}

    def put(self, key: Key) -> int:
        """Give a free buffer to an expert."""
        self._where[key] = buffer = self.free.pop()
        return buffer

    def drop(self, key: Key) -> None:
        """Free the buffer of an expert."""
        self.free.append(self._where.pop(key))

    def __contains__(self, key: Key) -> bool:
        return key in self._where

    def __getitem__(self, key: Key) -> int:
        return self._where[key]

    def clear(self) -> None:
        """Free all buffers."""
        self.free = list(range(self.number))
        self._where: dict[Key, int] = {}


class Visit:
    """One call of a layer: which of its experts are read, in which order and into which buffers.

    What was resident stays until the call has computed with it, then the rule of
    :mod:`consistency_reg.offload.cache` decides what stays. No expert is read twice.

    Args:
        layer: number of the layer.
        tokens: for each token of the call its experts in the router's order.
        cache: that the layer uses; it has seen the tokens afterwards.
        slots: that the cache's experts are in.
        store: of all experts.

    Attributes:
        experts: that the call uses, in increasing order.
        misses: those that were not resident.
    """

    def __init__(
        self, layer: int, tokens: Sequence[Sequence[int]], cache: ExpertCache, slots: Slots, store: Store
    ) -> None:
        self._layer, self._cache, self._slots, self._store = layer, cache, slots, store
        self.experts = sorted({expert for experts in tokens for expert in experts})
        self.misses = [expert for expert in self.experts if (layer, expert) not in slots]
        evicted = replay(cache, [[(layer, expert) for expert in experts] for experts in tokens])
        used = {(layer, expert) for expert in self.experts}
        for key in evicted - used:
            slots.drop(key)  # type: ignore[arg-type]
        self._to_read = deque(self.misses)
        self._arrival: dict[int, Callable[[], None]] = {}
        self._read_ahead()

    @property
    def hits_first(self) -> list[int]:
        """The experts, those that can be computed at once before those that are being read."""
        missing = set(self.misses)
        return sorted(self.experts, key=lambda expert: (expert in missing, expert))

    def rows(self, expert: int) -> Mapping[str, Tensor]:
        """Wait for an expert, and return its weights."""
        arrived = self._arrival.pop(expert, None)
        if arrived is not None:
            arrived()
        return self._slots.rows(self._slots[self._layer, expert])

    def done(self, expert: int) -> None:
        """Let go of an expert that has been computed with, unless it stays resident."""
        key = (self._layer, expert)
        if key not in self._cache:
            self._slots.drop(key)
            self._read_ahead()

    def _read_ahead(self) -> None:
        while self._to_read and self._slots.free:
            expert = self._to_read.popleft()
            rows = self._slots.rows(self._slots.put((self._layer, expert)))
            self._arrival[expert] = self._store.fetch(self._layer, expert, rows)
