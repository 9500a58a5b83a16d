"""Run a mixture-of-experts model whose experts are not in fast memory."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from consistency_reg.offload.budget import parse_bytes
from consistency_reg.offload.cache import ExpertCache, new_cache
from consistency_reg.offload.kernel import compute
from consistency_reg.offload.layers import experts_per_token
from consistency_reg.offload.origin import FromFolder, FromModel, Origin
from consistency_reg.offload.plan import Need, plan_slots
from consistency_reg.offload.reading import READS
from consistency_reg.offload.slots import Slots, Visit
from consistency_reg.offload.statistics import Counts, OffloadStatistics, Recorder
from consistency_reg.offload.stores import OntoGPU, Opening, Store
from consistency_reg.optional import require

STORES = ("disk", "host")
IMPLEMENTATION = "consistency_reg_offload"


class OffloadedExperts:
    """A model whose experts come from disk, or from host memory, into a few slots as tokens need them.

    A context manager that gives the model; ``attach()`` and ``detach()`` do the same. Works for every architecture of
    transformers whose experts go through its ``ExpertsInterface``, on any safetensors checkpoint of it. All experts are
    never in fast memory at once, so a model that is larger than the memory runs. Outputs are those of the model in
    memory with ``experts_implementation="eager"``: bit for bit on a CPU.

    *What stays in a slot.* A token's K experts are looked up together in the cache as the token found it: those there
    are hits, the others misses, which are read. Then each of the K, in the router's order, becomes resident, and the
    policy evicts. This is ``replay="token"`` with ``cold="miss"`` of :func:`consistency_reg.functional.cache_hit_rate`,
    and hits in decode are equal to it. A pass over several tokens (prefill) reads each expert that it needs and that is
    not resident once, whatever the slots, and leaves the residents that the same tokens one by one would have left.
    Residents stay from call to call until :meth:`reset`.

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
        policy: "lru" or "lfu".
        reads: "direct" goes past the page cache, so that a miss costs what the disk costs; "buffered" lets the kernel
            keep pages, which is faster where memory is left over.
        spread: "equal" slots for all layers; one cache "shared" by all layers; "auto", by ``curves``.
        curves: for each layer the hits with 1..E slots on text like the one to come, for ``spread="auto"``; see
            :func:`~consistency_reg.offload.budget.spread_slots`.
        dtype: of the loaded weights: "auto" (as saved), "float32", "bfloat16" or "float16".
        read_ahead: experts that may be on their way beyond the slots.
        threads: that read.
        read_bandwidth: bytes per second such as "500MB", to see what a slower disk would cost: reads are held back.
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
        new_cache(policy, 1)
        self._policy, self._spread = policy, spread
        limit = None if read_bandwidth is None else parse_bytes(read_bandwidth, "read_bandwidth")
        self._opening = Opening(store, reads, threads, limit)
        self._read_ahead, self._record, self._best_last = read_ahead, record, best_last
        given = isinstance(model_or_folder, nn.Module)
        self._origin: Origin = FromModel(model_or_folder, store) if given else FromFolder(model_or_folder, dtype)  # type: ignore[arg-type]
        self._layers = self._origin.layers
        self.top_k = experts_per_token(self._origin.config)
        expert_bytes = [layer.expert_elements * self._origin.dtype.itemsize for layer in self._layers]
        buffers = threads if store == "disk" and reads == "direct" else 0
        extra_bytes = (read_ahead + buffers) * max(expert_bytes)
        need = Need(self._layers, self.top_k, expert_bytes, self._origin.dense_bytes, extra_bytes)
        self.slots = plan_slots(need, cache_ratio=cache_ratio, slots=slots, memory=memory, spread=spread, curves=curves)
        self.model: Any = None
        self._caches: list[ExpertCache] = []
        self._slots_of: list[Slots] = []
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
            self._make_slots()
            self.model, self._live = self._origin.take(store, self.device)
            if self.device.type == "cuda":
                self._store = OntoGPU(store, self.device)
            self._dispatch()
        except BaseException:
            store.close()
            self.model = None
            raise
        return self.model

    def detach(self) -> None:
        """Let go of slots and files; a given model gets its experts back, one that was loaded here is used up."""
        if self.model is None:
            return
        self._store.close()
        for layer in self._live:
            del layer.module._offloaded
        for config, implementation in self._implementations:
            config._experts_implementation_internal = implementation
        self._origin.give_back()
        self._caches, self._slots_of, self.model = [], [], None

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
        if self.model is not None:
            about["slot_bytes"] = sum(slots.nbytes for slots in {id(s): s for s in self._slots_of}.values())
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
        mask = torch.zeros(self._layers[layer].num_experts, dtype=torch.bool)
        cache = self._caches[layer]
        for expert in range(len(mask)):
            mask[expert] = (layer, expert) in cache
        return mask

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
        """E of each layer."""
        return [layer.num_experts for layer in self._layers]

    def reset(self) -> None:
        """Empty the slots, and forget statistics and routing."""
        self.forget()
        for cache in self._caches:
            cache.clear()
        for slots in self._slots_of:
            slots.clear()

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
        cache, slots = self._caches[number], self._slots_of[number]
        if max(map(len, tokens)) > cache.slots:
            raise ValueError(f"slots must be at least {max(map(len, tokens))}, a token's experts, got {cache.slots}")
        try:
            visit = _Timed(number, tokens, cache, slots, self._store)
            output = compute(module, visit, hidden_NH, ids_NK, weights_NK)
        except BaseException:
            self.reset()  # slots may be half filled
            raise
        misses = len(visit.misses)
        read = misses * self._store.expert_bytes(number)
        counts = Counts(len(visit.experts) - misses, misses, read, visit.seconds_waiting)
        self._recorder.add(number, len(tokens), counts)
        if self._record:
            self._routing[number].append(ids)
        return output

    # Preparation

    def _make_slots(self) -> None:
        """Make the buffers, one set for layers of one shape, and the caches that say what is in them."""
        kinds = [tuple(layer.shapes.items()) for layer in self._layers]
        made: dict[Any, Slots] = {}
        for kind, layer in zip(kinds, self._layers, strict=True):
            number = sum(slots for slots, other in zip(self.slots, kinds, strict=True) if other == kind)
            if kind not in made:
                made[kind] = Slots(layer, number + self._read_ahead, self._origin.dtype, self.device)
        self._slots_of = [made[kind] for kind in kinds]
        shared = new_cache(self._policy, sum(self.slots)) if self._spread == "shared" else None
        self._caches = [shared or new_cache(self._policy, number) for number in self.slots]

    def _dispatch(self) -> None:
        """Have transformers compute the experts here."""
        register()
        configs: dict[int, Any] = {id(layer.module.config): layer.module.config for layer in self._live}
        self._implementations = [(config, config._experts_implementation) for config in configs.values()]
        for config in configs.values():
            config._experts_implementation_internal = IMPLEMENTATION
        for number, layer in enumerate(self._live):
            layer.module._offloaded = _Layer(self, number)  # type: ignore[assignment]


class _Timed(Visit):
    """A visit that knows how long it waited."""

    seconds_waiting = 0.0

    def rows(self, expert: int) -> Any:
        if expert not in self._arrival:
            return super().rows(expert)
        began = time.perf_counter()
        found = super().rows(expert)
        self.seconds_waiting += time.perf_counter() - began
        return found


class _Layer:
    """What an experts' module calls instead of its own loop."""

    def __init__(self, engine: OffloadedExperts, number: int) -> None:
        self._engine, self._number = engine, number

    def __call__(self, module: nn.Module, hidden_NH: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
        return self._engine._compute(self._number, module, hidden_NH, ids_NK, weights_NK)


def register() -> None:
    """Make the implementation known to transformers."""
    with require("transformers"):
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, offloaded_experts)


def offloaded_experts(module: Any, hidden_NH: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """Compute the experts of a layer by way of the slots: the function that transformers' interface calls.

    Raises:
        RuntimeError: the model is used outside of its ``with`` block.
    """
    layer: _Layer | None = getattr(module, "_offloaded", None)
    if layer is None:
        raise RuntimeError(
            "this model's experts are offloaded no longer: use it inside of `with OffloadedExperts(...)`"
        )
    return layer(module, hidden_NH, ids_NK, weights_NK)


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
    return found
