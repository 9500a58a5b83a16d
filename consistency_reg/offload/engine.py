"""Run a mixture-of-experts model whose experts are not in fast memory."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from consistency_reg.byte_sizes import parse_bandwidth
from consistency_reg.offload.cache import check_engine_policy
from consistency_reg.offload.interface import Dispatch
from consistency_reg.offload.kernel import kernel_of
from consistency_reg.offload.layers import experts_per_token
from consistency_reg.offload.memory import FastMemory
from consistency_reg.offload.origin import FromFolder, FromModel
from consistency_reg.offload.plan import Need, plan_slots
from consistency_reg.offload.reading import READS
from consistency_reg.offload.statistics import Counts, OffloadStatistics, Recorder
from consistency_reg.offload.stores import DiskStore, OntoGPU, Opening, Store

STORES = ("disk", "host")


class OffloadedExperts:
    """Runs a model whose experts come from disk, or from host memory, into a few slots as tokens need them.

    A context manager that gives the model; ``attach()`` and ``detach()`` do the same. Works for every architecture of
    transformers whose experts go through its ``ExpertsInterface``, on any safetensors checkpoint of it. All experts are
    never in fast memory at once, so a model that is larger than the memory runs. Outputs are those of the model in
    memory with ``experts_implementation="eager"``: bit for bit on a CPU.

    *What stays in a slot.* A token's K experts are looked up together in the cache as the token found it: those there
    are hits, the others misses, which are read. Then each of the K, in the router's order, becomes resident, and the
    policy evicts. This is ``replay="token"`` with ``cold="miss"`` of :func:`consistency_reg.functional.cache_hit_rate`,
    and hits in decode are equal to its, access by access. A pass over several tokens (prefill) reads each expert once
    that it needs and that is not resident, however few the slots, and leaves the residents that the same tokens one by
    one would have left. Residents stay from call to call until :meth:`reset`.

    *Memory.* The weights that are no experts', the slots, ``read_ahead`` more experts that may be on their way, and the
    readers' aligned buffers; ``statistics()`` has the bytes of each. Activations and the KV cache come on top.

    A GPU as the device is written but was never run where this was developed.

    Args:
        model_or_folder: a folder of ``save_pretrained``, a hub id, or a model in memory, whose experts are taken out
            while it is attached.
        cache_ratio: slots of a layer / K, unless ``slots`` or ``memory`` says it.
        slots: of every layer, or one number for each layer.
        memory: bytes such as "2GB" for weights and slots together.
        device: of the model and the slots: "cpu" or a CUDA device.
        store: "disk", the checkpoint's own files, or "host", host memory.
        policy: "lru", "lfu", or "fixed": the experts that ``usage`` counts most, whatever comes.
        usage: for each layer [E], how often its experts are used on text like the one to come, for "fixed".
        reads: "direct" goes past the page cache, so that a miss costs what the disk costs; "buffered" lets the kernel
            keep pages, which is faster where memory is left over.
        spread: "equal" slots for all layers; one cache "shared" by all layers; "auto", by ``curves``.
        curves: for each layer the hits with 1..E slots on text like the one to come, for ``spread="auto"``; see
            :func:`~consistency_reg.offload.budget.spread_slots`.
        dtype: of the loaded weights: "auto" (as saved), "float32", "bfloat16" or "float16".
        read_ahead: experts that may be on their way beyond the slots.
        threads: that read.
        read_bandwidth: bytes per second such as "500MB/s", to see what a slower disk would cost: reads are held back.
        record: whether :meth:`routing` can tell the experts of every token.
        best_last: whether a token's experts become resident in the reverse of the router's order, so that the best is
            the most recent, as :class:`~consistency_reg.CacheAwareRouting` has it: then its bias is for the experts
            that really are in slots, with the same slots, "lru", and a :meth:`reset` before each document.

    Raises:
        ValueError: fewer slots than K, a memory below what the model needs (the message says how much that is),
            quantized weights, an architecture whose experts do not go through the interface, an unknown option, a
            device that is not there.
        OSError: no such model, no safetensors checkpoint.
        ImportError: transformers is not installed.

    Example:
        >>> with OffloadedExperts("my-olmoe", memory="2GB") as model:  # doctest: +SKIP
        ...     text = model.generate(**tokenizer("Once", return_tensors="pt"))
    """

    def __init__(
        self,
        model_or_folder: nn.Module | str | Path,
        cache_ratio: float = 2.0,
        *,
        slots: int | Sequence[int] | None = None,
        memory: str | int | None = None,
        device: str | torch.device = "cpu",
        store: str = "disk",
        policy: str = "lru",
        usage: Sequence[Tensor] | None = None,
        reads: str = "direct",
        spread: str = "equal",
        curves: Sequence[Sequence[float]] | None = None,
        dtype: str | torch.dtype = "auto",
        read_ahead: int = 4,
        threads: int = 4,
        read_bandwidth: str | float | None = None,
        record: bool = False,
        best_last: bool = False,
    ) -> None:
        self.device = _device(device)
        _check_options(store, reads, read_ahead, threads)
        self._policy, self._usage, self._spread = policy, usage, spread
        self.read_bandwidth = None if read_bandwidth is None else parse_bandwidth(read_bandwidth)
        self._opening = Opening(store, reads, threads, self.read_bandwidth)
        self._read_ahead, self._record, self._best_last = read_ahead, record, best_last
        given = isinstance(model_or_folder, nn.Module)
        self._origin = FromModel(model_or_folder, store) if given else FromFolder(model_or_folder, dtype)  # type: ignore[arg-type]
        self._layers = self._origin.layers
        check_engine_policy(policy, usage, self.num_experts)
        self.top_k = experts_per_token(self._origin.config)
        expert_bytes = [layer.expert_elements * self._origin.dtype.itemsize for layer in self._layers]
        buffers = threads if store == "disk" and reads == "direct" else 0
        extra_bytes = (read_ahead + buffers) * max(expert_bytes)
        need = Need(self._layers, self.top_k, expert_bytes, self._origin.dense_bytes, extra_bytes)
        self.slots = plan_slots(need, cache_ratio=cache_ratio, slots=slots, memory=memory, spread=spread, curves=curves)
        self.model: Any = None
        self._memory: FastMemory | None = None
        self._recorder = Recorder(len(self._layers))
        self._routing: list[list[Tensor]] = [[] for _ in self._layers]

    # Coming and going

    def attach(self) -> Any:
        """Load the model without its experts, or take them out of the given one, and return it.

        Raises:
            RuntimeError: it is attached already.
            ValueError: a given model's experts are not those of its checkpoint.
        """
        if self.model is not None:
            raise RuntimeError("these experts are offloaded already: detach() first")
        store = self._origin.open_store(self._opening)
        self._store: Store = store
        try:
            self._memory = FastMemory(
                self._layers,
                self.slots,
                self._origin.dtype,
                self.device,
                policy=self._policy,
                usage=self._usage,
                shared=self._spread == "shared",
                read_ahead=self._read_ahead,
            )
            self.model, layers = self._origin.take(store, self.device)
            if self.device.type == "cuda":
                self._store = OntoGPU(store, self.device)
            self._kernels = [kernel_of(layer.module) for layer in layers]
            self._expert_bytes = [store.expert_bytes(number) for number in range(len(layers))]
            self._dispatch = Dispatch(layers, self._compute)
        except BaseException:
            store.close()
            self._origin.give_back()
            self.model = self._memory = None
            raise
        return self.model

    def detach(self) -> None:
        """Let go of slots and files; a given model gets its experts back, one that was loaded here is used up."""
        if self.model is None:
            return
        self._store.close()
        self._dispatch.undo()
        self._origin.give_back()
        self.model = self._memory = None

    def __enter__(self) -> Any:
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.detach()

    # What one asks

    def statistics(self) -> OffloadStatistics:
        """Return hits, misses, bytes read and seconds waiting since the last :meth:`reset`, by layer and by step."""
        shared = self._spread == "shared"
        about: dict[str, Any] = {"slots": [sum(self.slots)] if shared else list(self.slots)}
        if self._memory is not None:
            about["slot_bytes"] = self._memory.nbytes
            about["buffer_bytes"] = self._store.buffer_bytes
            about["way"] = self._store.way
        return self._recorder.statistics(**about)

    def routing(self) -> list[Tensor]:
        """Return the experts of every token since the last :meth:`reset`: [T, K] int64 for each layer.

        Raises:
            RuntimeError: nothing was recorded: it takes ``record=True`` and a forward pass.
        """
        if not all(self._routing):
            raise RuntimeError("no routing was recorded: OffloadedExperts(..., record=True), then run the model")
        return [torch.cat(calls) for calls in self._routing]

    def resident_mask(self, layer: int) -> Tensor:
        """Return which experts of a layer are in slots now: [E] bool, on the CPU."""
        if self._memory is None:
            return torch.zeros(self._layers[layer].num_experts, dtype=torch.bool)
        return self._memory.resident_mask(layer)

    def expert_bytes(self, layer: int) -> int:
        """Return the bytes that one miss of a layer moves."""
        return self._store.expert_bytes(layer)

    def empty_rows(self, layer: int) -> dict[str, Tensor]:
        """Return room for one expert of a layer beside the slots."""
        shapes, dtype = self._layers[layer].shapes, self._origin.dtype
        return {name: torch.empty(shape, dtype=dtype, device=self.device) for name, shape in shapes.items()}

    def fetch(self, layer: int, expert: int, rows: dict[str, Tensor]) -> Callable[[], None]:
        """Begin to read an expert into :meth:`empty_rows`, and return what waits for it; no slot changes."""
        return self._store.fetch(layer, expert, rows)

    @contextmanager
    def reads_unhindered(self) -> Iterator[None]:
        """Let reads be as fast as the disk within a block, whatever ``read_bandwidth`` is."""
        store = self._store.source if isinstance(self._store, OntoGPU) else self._store
        if not isinstance(store, DiskStore):
            yield
            return
        limit, store.bandwidth = store.bandwidth, None
        try:
            yield
        finally:
            store.bandwidth = limit

    def finish(self) -> None:
        """Wait until a GPU has done what it was told to; a CPU has."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @property
    def config(self) -> Any:
        """The configuration of the model, before it is attached too."""
        return self._origin.config

    @property
    def dense_bytes(self) -> int:
        """The bytes of all weights that are no routed experts'."""
        return self._origin.dense_bytes

    @property
    def layer_names(self) -> list[str]:
        """The modules of the experts, in the order of the layers' numbers."""
        return [layer.name for layer in self._layers]

    @property
    def num_experts(self) -> list[int]:
        """The number of routed experts of each layer, E."""
        return [layer.num_experts for layer in self._layers]

    def reset(self) -> None:
        """Empty the slots, and forget statistics and routing."""
        self.forget()
        if self._memory is not None:
            self._memory.clear()

    def forget(self) -> None:
        """Forget statistics and routing; what is in the slots stays."""
        self._recorder.clear()
        self._routing = [[] for _ in self._layers]

    # One call of a layer

    @torch.no_grad()
    def _compute(self, number: int, module: nn.Module, hidden_NH: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
        E = self._layers[number].num_experts
        ids = ids_NK.detach().cpu()
        in_order = ids.flip(-1) if self._best_last else ids
        tokens = [[expert for expert in experts if expert < E] for experts in in_order.tolist()]
        assert self._memory is not None
        visit = self._memory.visit(number, tokens, self._store)
        try:
            output = self._kernels[number](module, visit, hidden_NH, ids_NK, weights_NK)
        except BaseException:
            visit.abandon()
            self.reset()  # slots may be half filled
            raise
        misses = len(visit.misses)
        read = misses * self._expert_bytes[number]
        counts = Counts(len(visit.experts) - misses, misses, read, visit.seconds_waiting)
        self._recorder.add(number, len(tokens), counts)
        if self._record:
            self._routing[number].append(ids)
        return output


def _check_options(store: str, reads: str, read_ahead: int, threads: int) -> None:
    for name, value, known in (("store", store, STORES), ("reads", reads, READS)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    for name, number in (("read_ahead", read_ahead), ("threads", threads)):
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"{name} must be a positive integer, got {number!r}")


def _device(device: str | torch.device) -> torch.device:
    found = torch.device(device)
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or a CUDA device, got {found}")
    if found.type == "cuda" and (not torch.cuda.is_available() or (found.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"device {found} is not there: torch finds {torch.cuda.device_count()} CUDA devices")
    return torch.device("cuda", torch.cuda.current_device()) if found == torch.device("cuda") else found
