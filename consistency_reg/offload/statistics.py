"""Count what offloading cost, by layer and by step."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any


@dataclass
class Counts:
    """Sums the costs of some calls of layers.

    Attributes:
        hits: experts that were resident when a call needed them.
        misses: experts that were read.
        bytes_read: bytes of the experts that were read.
        seconds_waiting: of the host, for experts that had not arrived; a GPU waits by itself for copies.
    """

    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    seconds_waiting: float = 0.0

    def add(self, other: "Counts") -> None:
        """Add other sums to these."""
        self.hits += other.hits
        self.misses += other.misses
        self.bytes_read += other.bytes_read
        self.seconds_waiting += other.seconds_waiting

    @property
    def hit_rate(self) -> float:
        """Hits per needed expert; nan where none was needed."""
        needed = self.hits + self.misses
        return self.hits / needed if needed else float("nan")


@dataclass
class Step(Counts):
    """Describes one forward pass of the model.

    Attributes:
        tokens: of the pass: 1 in decode, those of the prompt in prefill.
        layers: the counts of each layer that was called, in their order.
    """

    tokens: int = 0
    layers: list[Counts] = field(default_factory=list)


@dataclass
class OffloadStatistics(Counts):
    """Holds what a run of an offloaded model cost.

    Attributes:
        layers: sums for each layer.
        steps: each forward pass.
        slots: of each layer, or the one number of a shared cache.
        slot_bytes: of all buffers, those for reading ahead included.
        buffer_bytes: of the readers' aligned buffers.
        way: how experts are read: "direct", "dropped", "buffered" or "host".
    """

    layers: list[Counts] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    slot_bytes: int = 0
    buffer_bytes: int = 0
    way: str = ""

    @property
    def prefill(self) -> Counts:
        """Sums over the passes of more than one token."""
        return _sum(step for step in self.steps if step.tokens > 1)

    @property
    def decode(self) -> Counts:
        """Sums over the passes of one token."""
        return _sum(step for step in self.steps if step.tokens == 1)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain numbers, for JSON."""
        return asdict(self)


def _sum(parts: Iterable[Counts]) -> Counts:
    total = Counts()
    for part in parts:
        total.add(part)
    return total


class Recorder:
    """Collects what each call of a layer cost.

    Args:
        num_layers: L.
    """

    def __init__(self, num_layers: int) -> None:
        self.num_layers, self._last_layer = num_layers, -1
        self.steps: list[Step] = []
        self.clear()

    def add(self, layer: int, tokens: int, counts: Counts) -> None:
        """Add one call; a layer that is called again begins a new step."""
        if not self.steps or layer <= self._last_layer:
            self.steps.append(Step(tokens=tokens))
        self._last_layer = layer
        for total in (self.layers[layer], self.steps[-1]):
            total.add(counts)
        self.steps[-1].layers.append(counts)

    def statistics(self, **about: Any) -> OffloadStatistics:
        """Return copies of all sums."""
        total = _sum(self.layers)
        steps = [replace(step, layers=list(step.layers)) for step in self.steps]
        layers = [replace(layer) for layer in self.layers]
        return OffloadStatistics(**vars(total), layers=layers, steps=steps, **about)

    def clear(self) -> None:
        """Forget everything."""
        self.layers = [Counts() for _ in range(self.num_layers)]
        self.steps = []
        self._last_layer = -1
