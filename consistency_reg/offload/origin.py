"""Take a model to offload from a folder, or from memory, and give it back."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from consistency_reg.offload.checkpoint import stored_tensors
from consistency_reg.offload.layers import ExpertLayer, find_expert_layers
from consistency_reg.offload.loading import (
    checkpoint_dtype,
    load_without_experts,
    local_folder,
    read_config,
    skeleton,
    to_device,
    to_meta,
)
from consistency_reg.offload.sources import divide
from consistency_reg.offload.stores import DiskStore, HostStore, Opening

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class FromFolder:
    """Loads a model of a folder or of the hub without its experts.

    Args:
        place: folder or hub id.
        dtype: of the loaded weights, "auto" as saved.

    Attributes:
        layers: of experts.
        config: of the model.
        dtype: of the experts in their slots.
        dense_bytes: of all other weights.
    """

    def __init__(self, place: str | Path, dtype: str | torch.dtype) -> None:
        self._folder = local_folder(place)
        self.config = read_config(self._folder)
        self._outline = skeleton(self.config)
        self.layers = find_expert_layers(self._outline)
        stored = stored_tensors(self._folder)
        self._sources = divide(self._outline, self.layers, stored)
        self.dtype = checkpoint_dtype(self.config, stored) if dtype == "auto" else _dtype(dtype)
        self.dense_bytes = _dense_bytes(self._outline, self.layers, self.dtype)

    def open_store(self, opening: Opening) -> DiskStore | HostStore:
        """Open the checkpoint's files, and read all experts where they shall be in host memory."""
        disk = DiskStore(self._sources, self.config, self.layers, opening)
        if opening.kind == "disk":
            return disk
        return HostStore(_read_all(disk, self.layers, self.dtype), opening.threads)

    def take(self, store: DiskStore | HostStore, device: torch.device) -> tuple[Any, list[ExpertLayer]]:
        """Return the loaded model, and its layers of experts."""
        model = load_without_experts(self._folder, self.config, self.layers, self._sources.dense, self.dtype)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        return to_device(model, device), find_expert_layers(model)

    def give_back(self) -> None:
        """Do nothing: the model that was loaded is used up."""


class FromModel:
    """Takes the experts out of a model in memory, and puts them back; has the attributes of :class:`FromFolder`.

    Args:
        model: of transformers.
        kind: of store: "disk" reads the experts from the folder that the model was loaded from.

    Raises:
        ValueError: the model was loaded from no folder.
    """

    def __init__(self, model: Any, kind: str) -> None:
        self._model, self.config = model, model.config
        self.layers = find_expert_layers(model)
        self.dtype = _experts_dtype(model, self.layers)
        self.dense_bytes = _dense_bytes(model, self.layers, self.dtype)
        self._folder = Path(getattr(self.config, "name_or_path", "") or ".")
        self._sources = None
        self._taken: list[dict[str, nn.Parameter]] | None = None  # of each layer; without data where a disk has it
        if kind == "disk":
            if not (self._folder / "config.json").is_file():
                raise ValueError("the model was loaded from no folder: save it and give that, or use store='host'")
            self._sources = divide(model, self.layers, stored_tensors(self._folder))

    def open_store(self, opening: Opening) -> DiskStore | HostStore:
        """Open the checkpoint's files, or keep the model's own parameters."""
        if self._sources is not None:
            return DiskStore(self._sources, self.config, self.layers, opening)
        weights = [{name: layer.module.get_parameter(name) for name in layer.shapes} for layer in self.layers]
        return HostStore(weights, opening.threads)

    def take(self, store: DiskStore | HostStore, device: torch.device) -> tuple[Any, list[ExpertLayer]]:
        """Put the experts' parameters onto the meta device; return the model, and its layers of experts.

        Raises:
            ValueError: they are not those of the checkpoint.
        """
        if self._sources is not None:
            self._check_unchanged(store)
        self._device = next(self._model.parameters()).device
        self._needs_grad = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        self._taken = [{name: to_meta(layer.module, name) for name in layer.shapes} for layer in self.layers]
        for weights in self._taken:
            for weight in weights.values():
                weight.data = weight.data.cpu() if self._sources is None else weight.data.new_empty(0)
        for parameter in self._needs_grad:
            parameter.requires_grad_(False)
        return to_device(self._model, device), self.layers

    def give_back(self) -> None:
        """Put the experts' parameters back if they were taken, filled from the checkpoint where they were read."""
        if self._taken is None:
            return
        if self._sources is not None:
            disk = DiskStore(self._sources, self.config, self.layers, Opening())
            for taken, read in zip(self._taken, _read_all(disk, self.layers, self.dtype), strict=True):
                for name, weight in read.items():
                    taken[name].data = weight
        for layer, taken in zip(self.layers, self._taken, strict=True):
            for name, parameter in taken.items():
                layer.module.register_parameter(name, parameter)
        to_device(self._model, self._device)
        for parameter in self._needs_grad:
            parameter.requires_grad_(True)
        self._taken = None

    def _check_unchanged(self, store: DiskStore | HostStore) -> None:
        for number, layer in enumerate(self.layers):
            rows = {name: torch.empty(shape, dtype=self.dtype) for name, shape in layer.shapes.items()}
            for expert in range(layer.num_experts):
                store.fetch(number, expert, rows)()
                held = {name: layer.module.get_parameter(name)[expert].cpu() for name in rows}
                if not all(torch.equal(held[name], row) for name, row in rows.items()):
                    raise ValueError(
                        f"{layer.name}: expert {expert} is not the one of {self._folder}, from which it would be read: "
                        "save the model and give that folder, or use store='host'"
                    )


def _read_all(disk: DiskStore, layers: Sequence[ExpertLayer], dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """Read every expert into memory, and close the store."""
    weights = []
    try:
        for number, layer in enumerate(layers):
            E = layer.num_experts
            held = {name: torch.empty((E, *shape), dtype=dtype) for name, shape in layer.shapes.items()}
            for expert in range(E):
                disk.fetch(number, expert, {name: weight[expert] for name, weight in held.items()})()
            weights.append(held)
    finally:
        disk.close()
    return weights


def _dense_bytes(model: nn.Module, layers: Sequence[ExpertLayer], dtype: torch.dtype) -> int:
    """Return the bytes of everything but the experts once it is loaded."""
    experts = {id(layer.module.get_parameter(name)) for layer in layers for name in layer.shapes}
    dense = (tensor for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in experts)
    return sum(t.numel() * (dtype.itemsize if t.is_floating_point() else t.element_size()) for t in dense)


def _experts_dtype(model: nn.Module, layers: Sequence[ExpertLayer]) -> torch.dtype:
    found = {layer.module.get_parameter(name).dtype for layer in layers for name in layer.shapes}
    if len(found) > 1 or not next(iter(found)).is_floating_point:
        raise ValueError(f"experts must be of one floating dtype, got {', '.join(sorted(map(str, found)))}")
    return found.pop()


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of auto, {', '.join(DTYPES)}, got {dtype!r}")
    return DTYPES[dtype]
