"""Load a model without its experts: everything else as transformers loads it, the experts on the meta device."""

import copy
import re
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from consistency_reg.offload.checkpoint import StoredTensor, as_bytes
from consistency_reg.offload.layers import ExpertLayer, find_expert_layers
from consistency_reg.offload.reading import FileReader
from consistency_reg.optional import require


def local_folder(place: str | Path) -> Path:
    """Return the folder of a model, that of the hub's cache for a hub id.

    Raises:
        OSError: there is neither a folder nor a model of the hub by this name.
    """
    path = Path(place)
    if (path / "config.json").is_file():
        return path
    if path.exists():
        raise FileNotFoundError(f"{path} must be a folder with config.json, and has none")
    with require("transformers"):
        from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(str(place), allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"]))
    except Exception as error:
        raise OSError(f"no model can be read from {str(place)!r}: {error}") from error


def read_config(folder: Path) -> Any:
    """Return the configuration of a model.

    Raises:
        ValueError: its weights are quantized.
    """
    with require("transformers"):
        from transformers import AutoConfig
    config = AutoConfig.from_pretrained(folder)
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        raise ValueError(f"{folder} is quantized ({method}): quantized experts are not computed here")
    return config


def model_class(config: Any) -> type[nn.Module]:
    """Return the class that the checkpoint was saved from, else the causal language model of its configuration."""
    with require("transformers"):
        import transformers
    for name in config.architectures or ():
        if isinstance(found := getattr(transformers, name, None), type):
            return found
    with torch.device("meta"):
        return type(transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config)))


def skeleton(config: Any) -> Any:
    """Return the model without any data."""
    with torch.device("meta"):
        return model_class(config)(copy.deepcopy(config))


def checkpoint_dtype(config: Any, stored: Mapping[str, StoredTensor]) -> torch.dtype:
    """Return the dtype that the configuration names, else that of the checkpoint's first floating tensor."""
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    floating = (tensor.dtype for tensor in stored.values() if tensor.dtype.is_floating_point)
    return next(floating, torch.float32)


def read_tensors(stored: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """Read tensors into memory, leaving nothing of them in the page cache."""
    tensors = {name: torch.empty(part.shape, dtype=part.dtype) for name, part in stored.items()}
    for path in {part.path for part in stored.values()}:
        with closing(FileReader(path)) as reader:
            for name, part in stored.items():
                if part.path == path and tensors[name].numel():
                    reader.read_into(as_bytes(tensors[name]), part.offset)
    return tensors


def load_without_experts(
    folder: Path, config: Any, layers: Sequence[ExpertLayer], dense: Mapping[str, StoredTensor], dtype: torch.dtype
) -> Any:
    """Return the model in evaluation mode; its experts' weights are on the meta device.

    Args:
        folder: of the checkpoint.
        config: its configuration.
        layers: of experts.
        dense: the tensors of the checkpoint that belong to no expert.
        dtype: of the loaded weights.

    Raises:
        ValueError: the checkpoint lacks other weights than the experts'.
    """
    with require("transformers"):
        from transformers import GenerationConfig
    whole = model_class(config)
    options = {"state_dict": read_tensors(dense), "dtype": dtype, "output_loading_info": True}
    model, loaded = _without_experts(whole).from_pretrained(None, config=config, **options)
    if lacking := sorted(loaded["missing_keys"]):
        raise ValueError(f"{folder} lacks {len(lacking)} of the model's weights, such as {lacking[0]}")
    model.__class__ = whole
    del model._keys_to_ignore_on_load_missing
    for layer in layers:
        for weight, shape in layer.shapes.items():
            module = model.get_submodule(layer.name)
            module.register_parameter(weight, _meta((layer.num_experts, *shape), dtype))
    model.config.name_or_path = str(folder)
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


def to_meta(module: nn.Module, weight: str) -> nn.Parameter:
    """Replace a parameter by one without data, and return it."""
    parameter = module.get_parameter(weight)
    module.register_parameter(weight, _meta(parameter.shape, parameter.dtype))
    return parameter


def to_device(model: Any, device: torch.device) -> Any:
    """Move everything that has data: all but offloaded experts."""
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and not parameter.is_meta:
                parameter.data = parameter.data.to(device)
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)
    return model


def _meta(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)


def _without_experts(whole: Any) -> Any:
    """Return a class whose models have experts without a single number, for ``from_pretrained`` to find missing."""

    def build(self: Any, *args: Any, **options: Any) -> None:
        whole.__init__(self, *args, **options)
        self._keys_to_ignore_on_load_missing = set(self._keys_to_ignore_on_load_missing or ())
        for layer in find_expert_layers(self):
            self._keys_to_ignore_on_load_missing.add(rf"(^|\.){re.escape(layer.name)}\.({'|'.join(layer.shapes)})$")
            for weight, shape in layer.shapes.items():
                layer.module.register_parameter(weight, _meta((layer.num_experts, *(0 for _ in shape)), torch.float32))

    kept = {"__module__": whole.__module__, "__qualname__": whole.__qualname__, "__doc__": whole.__doc__}
    return type(whole.__name__, (whole,), {"__init__": build, **kept})
