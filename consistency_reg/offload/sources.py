"""Find the parts of a checkpoint that each expert's weights are made of.

A checkpoint may hold a layer's experts as one 3D tensor or one by one, under other names than the model's, and with
gate and up projections apart. transformers says how by its conversion mapping; that mapping is applied here to one
expert at a time. Where an expert's weight is its parts' bytes one after the other, no conversion is needed at all.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from consistency_reg.offload.checkpoint import StoredTensor
from consistency_reg.offload.layers import ExpertLayer
from consistency_reg.optional import require

COMPUTED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass
class WeightSource:
    """Describes one weight of the experts of a layer.

    Attributes:
        name: of the weight in the experts' module.
        shape: of one expert's part.
        parts: for each expert the stored tensors that it is made of.
        patterns: what transformers' converter calls each of the parts.
        converter: of transformers; None where the parts' bytes in order are the weight.
        merged: whether the parts come from a tensor for each expert, not from one for all.
    """

    name: str
    shape: tuple[int, ...]
    parts: list[list[StoredTensor]]
    patterns: list[str] = field(default_factory=list)
    converter: Any = None
    merged: bool = False

    def convert(self, parts: Sequence[Tensor], config: Any, full_name: str) -> Tensor:
        """Return the weight of one expert from its parts as they are stored."""
        if self.converter is None:
            return torch.cat([part.reshape(-1) for part in parts]).reshape(self.shape)
        tensors: dict[str, list[Tensor]] = {}
        for pattern, part in zip(self.patterns, parts, strict=True):
            tensors.setdefault(pattern, []).append(part if self.merged else part[None])
        converted: dict[str, Any] = dict(tensors)
        for operation in self.converter.operations:
            converted = operation.convert(
                converted,
                source_patterns=self.converter.source_patterns,
                target_patterns=self.converter.target_patterns,
                full_layer_name=full_name,
                model=_OneExpert(self.shape),
                config=config,
                missing_keys=None,
            )
        made = next((value for target, value in converted.items() if target in full_name), None)
        made = next(iter(converted.values())) if made is None else made
        tensor: Tensor = made[0] if isinstance(made, list) else made
        return tensor.reshape(self.shape)


class _OneExpert:
    """Stands in for the model that a converter asks: one whose every weight holds a single expert."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._parameter = torch.empty((1, *shape), device="meta")

    def get_parameter(self, name: str) -> Tensor:
        """Return a parameter without data."""
        return self._parameter


@dataclass(frozen=True)
class Sources:
    """Divides a checkpoint into what the experts are made of and the rest.

    Attributes:
        experts: for each layer its weights.
        dense: the other tensors by their stored names.
    """

    experts: list[list[WeightSource]]
    dense: dict[str, StoredTensor]

    def expert_bytes(self, layer: int) -> int:
        """Return the stored bytes of one expert of a layer."""
        return sum(part.nbytes for weight in self.experts[layer] for part in weight.parts[0])


def divide(model: Any, layers: Sequence[ExpertLayer], stored: Mapping[str, StoredTensor]) -> Sources:
    """Find what each expert's weights are made of.

    Args:
        model: of transformers; its parameters may be on the meta device.
        layers: its layers of experts.
        stored: the checkpoint.

    Raises:
        ValueError: the checkpoint lacks a weight of an expert, or holds it in a form that is not computed here.
    """
    wanted = {f"{layer.name}.{weight}" for layer in layers for weight in layer.shapes}
    parts, dense = _assign(model, stored, wanted)
    joined: dict[tuple[Any, ...], bool] = {}  # by kind of source: layers are alike
    experts = []
    for layer in layers:
        weights = []
        for weight, shape in layer.shapes.items():
            full_name = f"{layer.name}.{weight}"
            source = _source(weight, shape, layer.num_experts, full_name, parts.get(full_name, []))
            _check_dtype(source, full_name)
            kind = (weight, shape, *source.patterns, *(part.shape for part in source.parts[0]))
            if kind not in joined:
                joined[kind] = _is_joined(source, full_name, model.config)
            if joined[kind]:
                source.converter = None
            weights.append(source)
        experts.append(weights)
    return Sources(experts, dense)


def _assign(
    model: Any, stored: Mapping[str, StoredTensor], wanted: Set[str]
) -> tuple[dict[str, list[tuple[StoredTensor, str | None, Any]]], dict[str, StoredTensor]]:
    """Return (the parts, patterns and converters of each wanted parameter, the tensors that are of none)."""
    with require("transformers"):
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key
    mapping = get_model_conversion_mapping(model)
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    renamings: list[Any] = [entry for entry in mapping if not isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    parameters = model.state_dict()
    prefix = model.base_model_prefix
    parts: dict[str, list[tuple[StoredTensor, str | None, Any]]] = {}
    dense: dict[str, StoredTensor] = {}
    for key in sorted(stored, key=dot_natural_key):  # the order in which transformers counts experts
        name, pattern = rename_source_key(key, renamings, converters, prefix, parameters)
        if name not in parameters and key in parameters:
            name, pattern = rename_source_key(key, [], [], prefix, parameters)
        converter = None if pattern is None else by_pattern[pattern]
        targets = [name] if converter is None else _targets(name, converter)
        found = [target for target in targets if target in wanted]
        for target in found:
            parts.setdefault(target, []).append((stored[key], pattern, converter))
        if not found:
            dense[key] = stored[key]
    return parts, dense


def _targets(name: str, converter: Any) -> list[str]:
    """Return every parameter that a converter makes of a tensor; ``name`` is the first of them."""
    first = converter.target_patterns[0]
    return [name, *(name.replace(first, other) for other in converter.target_patterns[1:])]


def _source(
    weight: str, shape: tuple[int, ...], E: int, full_name: str, found: list[tuple[StoredTensor, str | None, Any]]
) -> WeightSource:
    """Put the parts of one weight together, expert by expert."""
    if not found:
        raise ValueError(f"the checkpoint lacks {full_name}")
    converter = found[0][2]
    if len(found) == 1 and found[0][0].shape[:1] == (E,):
        tensor, pattern, _ = found[0]
        rows = [[tensor.row(expert)] for expert in range(E)]
        return WeightSource(weight, shape, rows, [pattern or ""], converter)
    if converter is None:
        raise ValueError(f"{full_name} is stored with shape {list(found[0][0].shape)}, and has {E} experts")
    by_pattern: dict[str, list[StoredTensor]] = {pattern: [] for pattern in converter.source_patterns}
    for tensor, pattern, _ in found:
        by_pattern[str(pattern)].append(tensor)
    used = {pattern: tensors for pattern, tensors in by_pattern.items() if tensors}
    if any(len(tensors) != E for tensors in used.values()):
        counts = ", ".join(f"{len(tensors)} x {pattern}" for pattern, tensors in used.items())
        raise ValueError(f"{full_name} needs {E} experts, and the checkpoint holds {counts}")
    parts = [[tensors[expert] for tensors in used.values()] for expert in range(E)]
    return WeightSource(weight, shape, parts, list(used), converter, merged=True)


def _check_dtype(source: WeightSource, full_name: str) -> None:
    quantized = next((part for part in source.parts[0] if part.dtype not in COMPUTED), None)
    if quantized is not None:
        raise ValueError(
            f"{full_name} is stored as {quantized.dtype}: quantized experts are not computed here, "
            "only float32, bfloat16 and float16"
        )


def _is_joined(source: WeightSource, full_name: str, config: Any) -> bool:
    """Return whether a weight is its parts one after the other: tried on one expert whose numbers are all distinct."""
    parts = source.parts[0]
    sizes = [torch.Size(part.shape).numel() for part in parts]
    numbers = torch.arange(sum(sizes))
    marked = [chunk.reshape(part.shape) for chunk, part in zip(numbers.split(sizes), parts, strict=True)]
    try:
        made = source.convert(marked, config, full_name)
    except Exception as error:
        raise ValueError(f"{full_name} cannot be made one expert at a time from this checkpoint: {error}") from error
    return torch.equal(made.reshape(-1), numbers)
