"""Choose which weights of a checkpoint learn in fine-tuning, and turn the result into a plain checkpoint again."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from consistency_reg.capture import RouterCapture
from consistency_reg.lab.checkpoint import model_folder, read_configuration
from consistency_reg.lab.upcycle.convert import QKV_BIAS
from consistency_reg.optional import require

with require("transformers"):
    from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
    from transformers.utils import has_file

PARTS = ("router", "experts", "lora", "lora_experts", "all")
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")


def pretrained_moe(
    path: str = "",
    train: Literal["router", "experts", "lora", "lora_experts", "all"] = "router",
    lora_rank: int = 8,
    lora_alpha: float = 16.0,
    lora_targets: Sequence[str] | None = None,
    dtype: Literal["float32", "bfloat16", "auto"] = "float32",
    trust_remote_code: bool = False,
) -> nn.Module:
    """Return a mixture-of-experts language model from a checkpoint, ready to be fine-tuned.

    Args:
        path: a folder of ``save_pretrained``, the folder of a finished run of ``consistency-reg fit``, or a hub id.
        train: what learns. "router": the routers alone. "experts": the blocks that routers are in, with all experts.
            "lora": the routers, and a low-rank update of the attention's matrices (PEFT's LoRA), which
            :func:`save_plain` merges into them. "lora_experts": the same with the experts' matrices. "all": every
            parameter.
        lora_rank: rank of the updates.
        lora_alpha: they are scaled by ``lora_alpha / lora_rank``.
        lora_targets: names, or ends of names, of the matrices to update; the attention's linear layers when None.
        dtype: of the weights in memory and when saved; "auto" is that of the checkpoint. Updates of a router are often
            too small for 16 bits: keep float32, and save memory with ``trainer.precision: bf16-mixed``.
        trust_remote_code: whether code that comes with the model may run.

    Returns:
        The model of transformers in training mode; with low-rank updates PEFT's wrapper of it. On the meta device the
        same without weights.

    Raises:
        ValueError: a model that is not causal or has no routers, code that is not trusted, a checkpoint that lacks
            weights, an option out of range, no matrix to update.
        OSError: no such checkpoint.
    """
    if train not in PARTS:
        raise ValueError(f"train must be one of {PARTS}, got {train!r}")
    if lora_rank < 1:
        raise ValueError(f"lora_rank must be at least 1, got {lora_rank}")
    config = checkpoint_config(path, trust_remote_code)
    with torch.device("meta"):
        try:
            empty = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        except ValueError as error:
            kind = type(config).__name__
            raise ValueError(f"model {path!r} must be a causal language model of transformers, got {kind}") from error
    try:
        routers = RouterCapture(empty).layer_names  # refuses a dense model before its weights are read
    except ValueError as error:
        if config.model_type not in QKV_BIAS:
            raise
        raise ValueError(f"{error} `consistency-reg upcycle {path}` makes a mixture of it") from error
    model = empty if torch.get_default_device().type == "meta" else _load(path, dtype, routers, trust_remote_code)
    return trainable(model.train(), train, lora_rank, lora_alpha, lora_targets)


def trainable(
    model: PreTrainedModel,
    train: str,
    lora_rank: int = 8,
    lora_alpha: float = 16.0,
    lora_targets: Sequence[str] | None = None,
) -> nn.Module:
    """Let a part of a model learn and freeze the rest; see :func:`pretrained_moe`."""
    routers = RouterCapture(model).found
    model.requires_grad_(train == "all")
    wrapped: nn.Module = model
    if train in ("lora", "lora_experts"):
        with require("peft"):
            from peft import LoraConfig, get_peft_model
        options: dict[str, Any] = {"r": lora_rank, "lora_alpha": lora_alpha}
        options["target_modules"] = list(lora_targets) if lora_targets is not None else attention_matrices(model)
        if train == "lora_experts":
            linear, stacked = expert_matrices(model)
            options["target_modules"] += linear
            options["target_parameters"] = stacked
        wrapped = get_peft_model(model, LoraConfig(**options))
    for router in routers:
        learns = model.get_submodule(router.block_name) if train == "experts" else router.module
        learns.requires_grad_(True)
    return wrapped


def attention_matrices(model: nn.Module) -> list[str]:
    """Return the names of the linear layers within attention, routers left out.

    Raises:
        ValueError: there are none.

    Example:
        >>> from consistency_reg.lab.model import small_moe
        >>> attention_matrices(small_moe(hidden_size=64, num_layers=1))[0]
        'model.layers.0.self_attn.q_proj'
    """
    routers = RouterCapture(model).layer_names
    blocks = [name for name, module in model.named_modules() if "Attention" in type(module).__name__]
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and any(name.startswith(f"{block}.") for block in blocks)
        and not any(f"{name}.".startswith(f"{router}.") for router in routers)
    ]
    if not found:
        raise ValueError(
            f"lora_targets must name the matrices to update: no linear layer within attention in {type(model).__name__}"
        )
    return found


def expert_matrices(model: nn.Module) -> tuple[list[str], list[str]]:
    """Return the names of the experts' linear layers, and of the parameters [E, out, in] that hold all experts.

    Raises:
        ValueError: there are neither.

    Example:
        >>> from consistency_reg.lab.model import small_moe
        >>> expert_matrices(small_moe(hidden_size=64, num_layers=1))[1][0]
        'model.layers.0.block_sparse_moe.experts.gate_up_proj'
    """
    blocks = tuple(f"{router.block_name}." for router in RouterCapture(model).found)
    stacked = [name for name, weights in model.named_parameters() if name.startswith(blocks) and weights.dim() == 3]
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(blocks) and ".experts." in name
    ]
    if not linear and not stacked:
        raise ValueError(f"train must not be 'lora_experts': no matrix of an expert is known in {type(model).__name__}")
    return linear, stacked


def save_plain(model: Any, folder: Path) -> None:
    """Save a model in the architecture of its checkpoint; low-rank updates are merged into their matrices.

    The updates are gone from ``model`` afterwards.
    """
    plain = model.merge_and_unload(safe_merge=True) if hasattr(model, "merge_and_unload") else model
    plain.save_pretrained(folder)


def checkpoint_config(path: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Return the configuration of a checkpoint.

    Args:
        path: as in :func:`pretrained_moe`.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        ValueError: no path, a run that is not finished, code that is not trusted, an unknown architecture.
        OSError: no such checkpoint.
    """
    option = "--model.model.trust_remote_code true"
    return read_configuration(checkpoint_place(path), trust_remote_code=trust_remote_code, option=option)


def checkpoint_place(path: str) -> str:
    """Return what transformers loads: the folder with the weights, or a hub id as it is.

    Raises:
        ValueError: no path, or a folder without a model.
        FileNotFoundError: something that can only be a folder, and is not there.
    """
    if not path:
        raise ValueError("model must name a checkpoint to fine-tune, got none: --model PATH_OR_ID")
    if (folder := model_folder(Path(path).expanduser())) is not None:
        return str(folder)
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise FileNotFoundError(f"model {path!r} does not exist")
    return path


def has_tokenizer(path: str) -> bool:
    """Return whether a checkpoint comes with a tokenizer; else ``AutoTokenizer`` may give one that knows no token."""
    place = checkpoint_place(path)
    return any(has_file(place, name) for name in TOKENIZER_FILES)


def _load(path: str, dtype: str, routers: Sequence[str], trust_remote_code: bool) -> PreTrainedModel:
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        checkpoint_place(path), dtype=dtype, output_loading_info=True, trust_remote_code=trust_remote_code
    )
    model, found = loaded
    missing = sorted(found["missing_keys"])
    of_routers = [key for key in missing if any(key.startswith(f"{router}.") for router in routers)]
    if missing:
        what = "weights of its routers" if of_routers else "weights"
        named = ", ".join((of_routers or missing)[:3])
        raise ValueError(f"checkpoint {path!r} lacks {what}, which would be random: {len(missing)} with {named}")
    return model
