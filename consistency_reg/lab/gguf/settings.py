"""Say which models can be written as GGUF, and what llama.cpp has to know about them beside their weights."""

from typing import Any

ARCHITECTURE = "granitemoe"  # llama.cpp's name, with and without shared experts
MODEL_TYPES = ("granitemoe", "granitemoeshared")
OTHERS = "llama.cpp's own convert_hf_to_gguf.py knows many more"


def check_exportable(config: Any) -> None:
    """Raise ValueError for a model that llama.cpp would compute otherwise, or not at all.

    Args:
        config: of a model of transformers.
    """
    if config.model_type not in MODEL_TYPES:
        known = " and ".join(MODEL_TYPES)
        raise ValueError(f"only models of {known} can be exported, got {config.model_type!r}: {OTHERS}")
    rope = config.rope_parameters.get("rope_type", "default")
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    needed = {
        "hidden_act": (config.hidden_act, "silu"),
        "attention_bias": (config.attention_bias, False),
        "rope_type": (rope, "default"),
        "head_dim": (head_size, config.hidden_size // config.num_attention_heads),
    }
    for name, (got, wanted) in needed.items():
        if got != wanted:
            raise ValueError(f"{name} must be {wanted!r} for an export to GGUF, got {got!r}")


def settings(config: Any) -> dict[str, int | float]:
    """Return the hyperparameters of a model under llama.cpp's keys, without the architecture's name before them.

    Args:
        config: of a model that :func:`check_exportable` accepts.
    """
    found = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.scale": float(config.attention_multiplier),
        "rope.dimension_count": config.hidden_size // config.num_attention_heads,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "expert_count": config.num_local_experts,
        "expert_used_count": config.num_experts_per_tok,
        "embedding_scale": float(config.embedding_multiplier),
        "residual_scale": float(config.residual_multiplier),
        "logit_scale": float(config.logits_scaling),
        "vocab_size": config.vocab_size,
    }
    if shared := getattr(config, "shared_intermediate_size", 0):
        found["expert_shared_feed_forward_length"] = shared
    return found
