"""Hold experts in fast memory: buffers of one expert each, and the caches that decide which experts stay in them."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from consistency_reg.offload.cache import Cache, new_caches, replay
from consistency_reg.offload.layers import ExpertLayer
from consistency_reg.offload.stores import Store


class Slots:
    """Holds buffers for the experts of layers of one shape. Experts are numbered through all layers of the model.

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
        self._rows = [{name: weight[buffer] for name, weight in self._weights.items()} for buffer in range(number)]
        self.clear()

    @property
    def nbytes(self) -> int:
        """The bytes of all buffers."""
        return sum(weight.nbytes for weight in self._weights.values())

    def rows(self, expert: int) -> dict[str, Tensor]:
        """Return the weights of an expert."""
        return self._rows[self._where[expert]]

    def put(self, expert: int) -> None:
        """Give a free buffer to an expert."""
        self._where[expert] = self.free.pop()

    def drop(self, expert: int) -> None:
        """Free the buffer of an expert."""
        self.free.append(self._where.pop(expert))

    def __contains__(self, expert: int) -> bool:
        return expert in self._where

    def clear(self) -> None:
        """Free all buffers."""
        self.free = list(range(len(self._rows)))
        self._where: dict[int, int] = {}


class FastMemory:
    """Holds the slots of all layers.

    Args:
        layers: of experts.
        slots: of each layer.
        dtype: of the weights.
        device: of the slots.
        policy: of the caches.
        usage: for each layer [E], for "fixed".
        shared: whether all layers share one cache, of the sum of the slots.
        read_ahead: buffers beyond the slots, in which experts are that come and go.
    """

    def __init__(
        self,
        layers: Sequence[ExpertLayer],
        slots: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        *,
        policy: str,
        usage: Sequence[Tensor] | None,
        shared: bool,
        read_ahead: int,
    ) -> None:
        experts = [layer.num_experts for layer in layers]
        self._experts = experts
        self._first = [0, *accumulate(experts)][:-1]
        kinds = [tuple(layer.shapes.items()) for layer in layers]
        made: dict[Any, Slots] = {}
        for kind, layer in zip(kinds, layers, strict=True):
            if kind not in made:
                number = sum(count for count, other in zip(slots, kinds, strict=True) if other == kind)
                made[kind] = Slots(layer, number + read_ahead, dtype, device)
        self._slots = [made[kind] for kind in kinds]
        if shared:
            together = None if usage is None else [torch.cat(list(usage))]
            self._caches = new_caches(policy, [sum(slots)], together, [0]) * len(layers)
        else:
            self._caches = new_caches(policy, slots, usage, self._first)

    @property
    def nbytes(self) -> int:
        """The bytes of all buffers."""
        return sum(slots.nbytes for slots in {id(slots): slots for slots in self._slots}.values())

    def visit(self, layer: int, tokens: Sequence[Sequence[int]], store: Store) -> "Visit":
        """Begin a call of a layer; the caches have seen its tokens afterwards.

        Args:
            layer: number of the layer.
            tokens: for each token of the call its experts in the router's order.
            store: of all experts.

        Raises:
            ValueError: a token has more experts than there are slots.
        """
        cache = self._caches[layer]
        most = max(map(len, tokens))
        if most > cache.slots:
            raise ValueError(f"slots must be at least {most}, the experts of a token, got {cache.slots}")
        return Visit(layer, self._first[layer], tokens, cache, self._slots[layer], store)

    def resident_mask(self, layer: int) -> Tensor:
        """Return which experts of a layer are in slots: [E] bool, on the CPU."""
        first = self._first[layer]
        return torch.tensor([first + expert in self._slots[layer] for expert in range(self._experts[layer])])

    def clear(self) -> None:
        """Empty all slots."""
        for cache in self._caches:
            cache.clear()
        for slots in self._slots:
            slots.clear()


class Visit:
    """Plans one call of a layer: which of its experts are read, in which order and into which buffers.

    What is resident stays until the call has computed with it; then the rule of :mod:`consistency_reg.offload.cache`
    decides. No expert is read twice.

    Args:
        layer: number of the layer.
        first: number of its first expert among those of all layers.
        tokens: for each token of the call its experts in the router's order.
        cache: that the layer uses.
        slots: that the cache's experts are in.
        store: of all experts.

    Attributes:
        experts: that the call uses, in increasing order.
        misses: those that were in no slot.
        seconds_waiting: for experts that had not arrived.
    """

    def __init__(
        self, layer: int, first: int, tokens: Sequence[Sequence[int]], cache: Cache, slots: Slots, store: Store
    ) -> None:
        self._layer, self._first, self._cache, self._slots, self._store = layer, first, cache, slots, store
        self.experts = sorted({expert for experts in tokens for expert in experts})
        self.misses = [expert for expert in self.experts if first + expert not in slots]
        self.seconds_waiting = 0.0
        evicted = replay(cache, ([first + expert for expert in experts] for experts in tokens))
        for key in evicted.difference(first + expert for expert in self.experts):
            slots.drop(key)
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
        arrived = self._arrival.get(expert)
        if arrived is not None:
            began = perf_counter()
            arrived()
            self.seconds_waiting += perf_counter() - began
            del self._arrival[expert]  # when it has: an interrupted wait is taken up again by abandon()
        return self._slots.rows(self._first + expert)

    def done(self, expert: int) -> None:
        """Let go of an expert that has been computed with, unless it stays resident."""
        key = self._first + expert
        if key not in self._cache:
            self._slots.drop(key)
            self._read_ahead()

    def abandon(self) -> None:
        """Wait until no read is on its way any more, failed or not."""
        for arrived in self._arrival.values():
            try:
                arrived()
            except Exception:
                continue
        self._arrival.clear()

    def _read_ahead(self) -> None:
        while self._to_read and self._slots.free:
            expert = self._to_read.popleft()
            self._slots.put(self._first + expert)
            rows = self._slots.rows(self._first + expert)
            self._arrival[expert] = self._store.fetch(self._layer, expert, rows)
