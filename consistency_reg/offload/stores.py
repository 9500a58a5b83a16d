"""Store the experts that are in no slot, and bring them into slots."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from consistency_reg.offload.checkpoint import StoredTensor, as_bytes
from consistency_reg.offload.layers import ExpertLayer
from consistency_reg.offload.reading import FileReader
from consistency_reg.offload.sources import Sources, WeightSource

Rows = Mapping[str, Tensor]  # one expert's weights by name


@dataclass(frozen=True)
class Opening:
    """Says how a store is to be opened.

    Attributes:
        kind: "disk" or "host".
        reads: "direct" or "buffered", see :class:`~consistency_reg.offload.reading.FileReader`.
        threads: that read.
        bandwidth: bytes per second that reads are held back to; None for what the disk gives.
    """

    kind: str = "disk"
    reads: str = "direct"
    threads: int = 4
    bandwidth: int | None = None


class Store(Protocol):
    """Holds all experts of a model."""

    way: str

    @property
    def buffer_bytes(self) -> int:
        """The bytes of buffers that reading needs."""

    def fetch(self, layer: int, expert: int, rows: Rows) -> Callable[[], None]:
        """Begin to fill ``rows``, and return what waits until they can be computed with."""

    def expert_bytes(self, layer: int) -> int:
        """Return the bytes that are moved for one expert of a layer."""

    def close(self) -> None:
        """Wait for what is on its way, and let go of files and threads."""


class DiskStore:
    """Reads experts from the safetensors files of a checkpoint, several parts at once.

    Args:
        sources: what each expert is made of.
        config: of the model.
        layers: its layers of experts.
        opening: how to read.

    Attributes:
        bandwidth: bytes per second that reads are held back to; None for what the disk gives. May be set.
    """

    def __init__(self, sources: Sources, config: Any, layers: Sequence[ExpertLayer], opening: Opening) -> None:
        self._sources, self._config, self._layers = sources, config, layers
        self.bandwidth, self._lock, self._busy_until = opening.bandwidth, threading.Lock(), 0.0
        paths = {
            part.path for weights in sources.experts for weight in weights for parts in weight.parts for part in parts
        }
        self._readers: dict[Path, FileReader] = {}
        buffers = threading.local()
        with ExitStack() as opened:  # closes what is open where a file cannot be
            for path in sorted(paths):
                self._readers[path] = FileReader(path, opening.reads, buffers)
                opened.callback(self._readers[path].close)
            opened.pop_all()
        self._pool = ThreadPoolExecutor(opening.threads, thread_name_prefix="experts")
        self.way = next(iter(self._readers.values())).way

    def fetch(self, layer: int, expert: int, rows: Rows) -> Callable[[], None]:
        """Submit the reads of one expert, one for each stored part."""
        jobs: list[Future[None]] = []
        for weight in self._sources.experts[layer]:
            row = rows[weight.name]
            parts = weight.parts[expert]
            if weight.converter is None and row.device.type == "cpu" and parts[0].dtype == row.dtype:
                begin, view = 0, as_bytes(row)
                for part in parts:
                    jobs.append(self._pool.submit(self._read, part, view[begin : begin + part.nbytes]))
                    begin += part.nbytes
            else:
                full_name = f"{self._layers[layer].name}.{weight.name}"
                jobs.append(self._pool.submit(self._read_and_convert, weight, expert, full_name, row))
        return lambda: _wait(jobs)

    def expert_bytes(self, layer: int) -> int:
        """Return the stored bytes of one expert of a layer."""
        return self._sources.expert_bytes(layer)

    @property
    def buffer_bytes(self) -> int:
        """The bytes of the threads' aligned buffers, none where reads go straight to the slots."""
        largest = max(
            part.nbytes for weights in self._sources.experts for weight in weights for part in weight.parts[0]
        )
        aligned = [reader.block for reader in self._readers.values() if reader.way == "direct"]
        return self._pool._max_workers * (largest + 2 * max(aligned)) if aligned else 0

    def close(self) -> None:
        """Wait for the reads, and close the files."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        for reader in self._readers.values():
            reader.close()

    def _read(self, part: StoredTensor, destination: memoryview) -> None:
        began = time.monotonic()
        self._readers[part.path].read_into(destination, part.offset)
        if (bandwidth := self.bandwidth) is not None:
            self._hold_back(began, part.nbytes / bandwidth)

    def _hold_back(self, began: float, seconds: float) -> None:
        """Wait until a disk that takes so long, and does one read after the other, would be done."""
        with self._lock:
            self._busy_until = max(began, self._busy_until) + seconds
            until = self._busy_until
        time.sleep(max(0.0, until - time.monotonic()))

    def _read_and_convert(self, weight: WeightSource, expert: int, full_name: str, row: Tensor) -> None:
        tensors = []
        for part in weight.parts[expert]:
            tensors.append(torch.empty(part.shape, dtype=part.dtype))
            self._read(part, as_bytes(tensors[-1]))
        row.copy_(weight.convert(tensors, self._config, full_name))


class HostStore:
    """Holds experts in the memory of the host, as a model's own parameters do.

    Args:
        weights: for each layer its weights by name, [E, ...] each.
        threads: that copy.
    """

    way = "host"

    def __init__(self, weights: Sequence[Mapping[str, Tensor]], threads: int) -> None:
        self._weights = weights
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="experts")

    @property
    def buffer_bytes(self) -> int:
        """No bytes: copies need no buffer."""
        return 0

    def fetch(self, layer: int, expert: int, rows: Rows) -> Callable[[], None]:
        """Submit the copy of one expert."""
        jobs = [self._pool.submit(self._copy, layer, expert, rows)]
        return lambda: _wait(jobs)

    def expert_bytes(self, layer: int) -> int:
        """Return the bytes of one expert of a layer."""
        return sum(weight[0].nbytes for weight in self._weights[layer].values())

    def rows(self, layer: int, expert: int) -> Rows:
        """Return the weights of one expert, where they are."""
        return {name: weight.detach()[expert] for name, weight in self._weights[layer].items()}

    def pin(self) -> None:
        """Bring the weights into pinned memory, one after the other, so that none is held twice for long."""
        for layer in self._weights:
            for weight in layer.values():
                weight.data = weight.data.pin_memory()

    def close(self) -> None:
        """Wait for the copies."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _copy(self, layer: int, expert: int, rows: Rows) -> None:
        held = self.rows(layer, expert)
        for name, row in rows.items():
            row.copy_(held[name])


class OntoGPU:
    """Copies what another store brings to pinned memory on to a CUDA device, next to its computing.

    A copy runs on a stream of its own. It begins when everything is over that the device was told to compute before
    :meth:`fetch`, among it what used the slot's former expert; what is computed after the wait begins when the copy is
    over. The host waits for reads from disk alone.

    Never run where this was written, which has no GPU: tests check the order of the streams' work on stand-ins.

    Args:
        store: on the host; a :class:`HostStore` is pinned.
        device: of the slots.

    Attributes:
        source: the store on the host.
    """

    def __init__(self, store: DiskStore | HostStore, device: torch.device) -> None:
        self.source, self._device = store, device
        self._stream = torch.cuda.Stream(device)
        self.way = f"{store.way}, then {device}"
        if isinstance(store, HostStore):
            store.pin()

    def fetch(self, layer: int, expert: int, rows: Rows) -> Callable[[], None]:
        """Begin to bring an expert to the device."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))  # what computes with the slot's former expert
        if isinstance(self.source, HostStore):
            return self._copy(self.source.rows(layer, expert), rows)
        pinned: Rows = {name: torch.empty_like(row, device="cpu", pin_memory=True) for name, row in rows.items()}
        read = self.source.fetch(layer, expert, pinned)

        def wait() -> None:
            read()
            self._copy(pinned, rows)()

        return wait

    def expert_bytes(self, layer: int) -> int:
        """Return the bytes of one expert of a layer."""
        return self.source.expert_bytes(layer)

    @property
    def buffer_bytes(self) -> int:
        """The bytes of the other store's buffers."""
        return self.source.buffer_bytes

    def close(self) -> None:
        """Wait for the copies."""
        self._stream.synchronize()
        self.source.close()

    def _copy(self, pinned: Rows, rows: Rows) -> Callable[[], None]:
        with torch.cuda.stream(self._stream):
            for name, row in rows.items():
                row.copy_(pinned[name], non_blocking=True)
            done = self._stream.record_event()

        return lambda: torch.cuda.current_stream(self._device).wait_event(done)


def _wait(jobs: Sequence[Future[Any]]) -> None:
    """Wait for all jobs, so that none writes into a slot any more when the first error is raised."""
    wait(jobs)
    for job in jobs:
        job.result()
