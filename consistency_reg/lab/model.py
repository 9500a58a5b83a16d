"""The small mixture-of-experts language models that recipes train, built from transformers configurations."""

import copy
import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GraniteMoeSharedConfig,
    GraniteMoeSharedForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.granitemoeshared.modeling_granitemoeshared import GraniteMoeSharedMLP


def small_moe(
    vocab_size: int = 4096,
    hidden_size: int = 128,
    num_layers: int = 4,
    num_heads: int = 4,
    expert_size: int = 64,
    num_experts: int = 32,
    top_k: int = 4,
    shared_experts: int = 0,
    dense_layers: Sequence[int] | None = None,
    tie_embeddings: bool = True,
    context_length: int = 512,
    seed: int = 0,
) -> PreTrainedModel:
    """Build a decoder whose layers are mixtures of experts, with or without shared ones, some dense if asked for.

    One architecture (GraniteMoeShared: SwiGLU experts, softmax over the chosen experts' logits) serves both sides of
    the shared-expert question. Shared experts take the place of routed ones, as in arXiv 2505.16056: 64 experts of
    which 8 are active become 63/7 + 1 shared or 62/6 + 2 shared, so total and active parameters stay equal up to the
    router's rows. A dense layer is one MLP as wide as all experts of a layer together, so total parameters stay equal,
    while all of its parameters are active.

    Args:
        vocab_size: tokens of the vocabulary.
        hidden_size: width of the residual stream.
        num_layers: L.
        num_heads: attention heads.
        expert_size: hidden width of one expert.
        num_experts: experts of a layer, shared ones included.
        top_k: experts that work on a token, shared ones included.
        shared_experts: how many of them are always on instead of routed.
        dense_layers: numbers, from 0, of the layers without a router; none when None.
        tie_embeddings: whether the head's weights are those of the embedding.
        context_length: longest row.
        seed: of the initial weights, drawn for each parameter by its name: two models share every parameter whose
            name and shape agree.

    Raises:
        ValueError: no expert or no choice is left to the router, or no layer has one.
    """
    routed, active = num_experts - shared_experts, top_k - shared_experts
    if shared_experts < 0 or active < 1 or active > routed:
        raise ValueError(
            "num_experts, top_k and shared_experts must leave the router at least one active expert, "
            f"got num_experts={num_experts}, top_k={top_k}, shared_experts={shared_experts}"
        )
    dense = sorted(set(dense_layers or ()))
    if not set(dense) < set(range(num_layers)):
        raise ValueError(
            f"dense_layers must be numbers of layers, 0 to {num_layers - 1}, and leave at least one layer its router, "
            f"got {list(dense_layers or ())}"
        )
    options: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": expert_size,
        "shared_intermediate_size": shared_experts * expert_size,
        "num_local_experts": routed,
        "num_experts_per_tok": active,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_heads,
        "attention_multiplier": (hidden_size // num_heads) ** -0.5,
        "max_position_embeddings": context_length,
        "tie_word_embeddings": tie_embeddings,
        "use_cache": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    model: PreTrainedModel
    if dense:
        config = PartlyDenseConfig(dense_layers=dense, dense_intermediate_size=num_experts * expert_size, **options)
        model = PartlyDenseForCausalLM(config)
    else:
        model = GraniteMoeSharedForCausalLM(GraniteMoeSharedConfig(**options))
    initialize_by_name(model, std=model.config.initializer_range, seed=seed)
    return model


class PartlyDenseConfig(GraniteMoeSharedConfig):
    """Configures GraniteMoeShared with layers that have no router, which its own configuration cannot say.

    Args:
        dense_layers: their numbers.
        dense_intermediate_size: hidden width of their MLP.
    """

    model_type = "granitemoeshared_partly_dense"
    dense_layers: list[int] | None = None
    dense_intermediate_size: int = 0


class PartlyDenseForCausalLM(GraniteMoeSharedForCausalLM):
    """Puts an MLP in the place of the experts, shared ones included, in some layers of GraniteMoeShared."""

    config_class = PartlyDenseConfig

    def __init__(self, config: PartlyDenseConfig) -> None:
        super().__init__(config)
        mlp_config = copy.deepcopy(config)
        mlp_config.shared_intermediate_size = config.dense_intermediate_size
        for index in config.dense_layers or ():
            layer = self.model.layers[index]
            layer.block_sparse_moe = GraniteMoeSharedMLP(mlp_config)
            layer.shared_mlp = None


# So that a saved model is found by its folder alone, as any other of transformers.
AutoConfig.register(PartlyDenseConfig.model_type, PartlyDenseConfig)
AutoModelForCausalLM.register(PartlyDenseConfig, PartlyDenseForCausalLM)


@torch.no_grad()
def initialize_by_name(model: nn.Module, *, std: float, seed: int) -> None:
    """Draw every weight matrix from N(0, std), each by a generator that is seeded by ``seed`` and its name."""
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or parameter.is_meta:
            continue  # norms start at one, biases at zero; a model on the meta device has no weights to draw
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        parameter.copy_(torch.empty(parameter.shape).normal_(0, std, generator=generator))


def count_parameters(model: PreTrainedModel) -> tuple[int, int]:
    """Return the parameters (total, active per token); of the routed experts' weights K/E are active.

    All count as active where the configuration does not say E and K under the usual names.

    Example:
        >>> count_parameters(small_moe(hidden_size=64, num_layers=1))
        (673984, 329920)
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    counts = expert_counts(model.config)
    if counts is None:
        return total, total
    experts, top_k = counts
    routed = sum(parameter.numel() for name, parameter in model.named_parameters() if ".experts." in name)
    return total, total - routed + routed * top_k // experts


def expert_counts(config: PreTrainedConfig) -> tuple[int, int] | None:
    """Return E and K of a configuration that says them under the usual names; None otherwise.

    Example:
        >>> expert_counts(small_moe(hidden_size=64, num_layers=1).config)
        (32, 4)
    """
    text = config.get_text_config()
    top_k = getattr(text, "num_experts_per_tok", None)
    experts = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None)
    return (experts, top_k) if isinstance(experts, int) and isinstance(top_k, int) else None
