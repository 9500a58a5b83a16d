"""Every mixture-of-experts architecture of the installed transformers as a tiny model with random weights.

Nothing here is a list of models: a model belongs when its configuration, or one inside it, has a field about experts.
Its default configuration is made tiny field by field (:data:`SIZES`); :data:`ADJUSTMENTS` holds what no general rule
can know, such as two fields that must agree.
"""

import re
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

LAYERS, E, K, VOCABULARY = 4, 8, 2, 64

# The first pattern that a field's name matches gives its value; what is smaller already stays, except in ALWAYS.
SIZES = (
    (r"^(moe_)?(num|n)_(local_|routed_)?experts$|^moe_num_experts$", E),
    (r"experts_per_tok|^moe_topk$|^moe_top_k$|^top_k_experts$|^moe_k$", K),
    (r"^(n|num)_shared_experts$", 1),
    (r"vocab_size", VOCABULARY),
    (r"^(num_hidden_layers|num_layers|n_layers|encoder_layers|decoder_layers|num_decoder_layers|depth)$", LAYERS),
    (r"lora_rank", 8),
    (r"^n_group$|num_expert_group", 4),
    (r"topk_group", 2),
    (r"n_groups$", 2),
    (r"_heads$|^kv_n_heads$", 4),
    (r"head_dim$|head_size$", 8),
    (r"intermediate|ffn_dim|ffn_hidden|mlp_dim|d_ff|ff_dim|share_expert_dim", 16),
    (r"hidden_size|^(d_model|embed_dim|hidden_dim|emb_dim|dim)$", 32),
)
ALWAYS = re.compile(r"experts|moe_top|moe_k|moe_intermediate|n_group$|topk_group|num_expert_group")
NONE_STAYS = re.compile(r"group")

MULTIMODAL = ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES")
ENCODER_DECODER = ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",)
CAUSAL = ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",)
OTHER = ("MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES", "MODEL_MAPPING_NAMES", "MODEL_FOR_BACKBONE_MAPPING_NAMES")

# Model type -> arguments of its configuration, where fields are derived from others when it is made.
MADE_WITH: dict[str, dict[str, Any]] = {
    "dots3_note_text": {"num_hidden_layers": LAYERS, "use_sliding_window": False},
    "dots3_note": {
        "text_config": {"num_hidden_layers": LAYERS, "use_sliding_window": False},
        "vision_config": {"pyramid_num_routed": [-1, -1, 8, 8], "num_hidden_layers": LAYERS},
    },
}

# Model type -> dotted field -> value.
ADJUSTMENTS: dict[str, dict[str, Any]] = {
    "axk2": {"n_group": 4, "topk_group": 2},
    "dbrx": {"attn_config.rope_theta": 1e4, "attn_config.clip_qkv": 8.0},
    "deepseek_v2": {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    "doge": {"num_experts": 16},  # a square
    "deepseek_ocr2": {"text_config.mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "ernie4_5_vl_moe": {"text_config.rope_parameters.mrope_section": [1, 1, 2]},
    "glm4v_moe": {"text_config.rope_parameters.mrope_section": [1, 1, 0]},
    "glm4v_moe_text": {"rope_parameters.mrope_section": [1, 1, 0]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2, "mamba_d_head": 16},
    "hunyuan_v1_moe": {"head_dim": 8},
    "inkling_mm_model": {"vision_config.patch_size": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"zero_expert_num": 2},
    "mimo_v2_flash": {"num_key_value_heads": 2},
    "mistral4": {"head_dim": 16},
    "mistral_large4": {"text_config.kv_source_layers": list(range(LAYERS))},
    "mistral_large4_text": {"kv_source_layers": list(range(LAYERS))},
    "muse_spark": {"audio_config.hidden_sizes": [8] * LAYERS},
    "qwen3_omni_moe": {"talker_config.text_config.shared_expert_intermediate_size": 16},
    "step3p7": {"text_config.sliding_window": 8},
}
for _model_type, _prefix in (("qwen4_exp", "text_config."), ("qwen4_exp_text", "")):
    ADJUSTMENTS[_model_type] = {
        f"{_prefix}indexer_{name}": value
        for name, value in {"n_heads": 4, "kv_heads": 1, "head_dim": 8, "budget": 8, "compress_ratio": 2}.items()
    }


def moe_model_types() -> list[str]:
    """Return the library's own model types whose configuration, or one inside it, has a field about experts."""
    own = (name for name in CONFIG_MAPPING if CONFIG_MAPPING[name].__module__.startswith("transformers."))
    return sorted(model_type for model_type in own if _has_experts(CONFIG_MAPPING[model_type]))


def _has_experts(config_class: type[PreTrainedConfig]) -> bool:
    if _names_experts(config_class):
        return True
    with suppress(Exception):  # a configuration without usable defaults says what it is by its fields alone
        return any(_names_experts(type(config)) for config in _configs(config_class()))
    return any(_names_experts(part) for part in config_class.sub_configs.values())


def _names_experts(config_class: type) -> bool:
    return any(re.search(r"expert", name) for name in getattr(config_class, "__dataclass_fields__", ()))


def _configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _configs(value)


def tiny_config(model_type: str) -> PreTrainedConfig:
    """Return the default configuration of a model type, made tiny."""
    config = CONFIG_MAPPING[model_type](**MADE_WITH.get(model_type, {}))
    for part in _configs(config):
        _shrink(part)
    for path, value in ADJUSTMENTS.get(model_type, {}).items():
        owner = config
        *parents, field = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        if isinstance(owner, dict):
            owner[field] = value
        else:
            setattr(owner, field, value)
    return config


def _shrink(config: PreTrainedConfig) -> None:
    layers = vars(config).get("num_hidden_layers")
    for name, value in list(vars(config).items()):
        if isinstance(value, (list, tuple)) and len(value) == layers and layers > LAYERS:
            setattr(config, name, [*value[:2], *value[-2:]])  # so that layers of every kind remain
        size = next((size for pattern, size in SIZES if re.search(pattern, name)), None)
        if isinstance(value, bool) or size is None:
            continue
        of_experts = ALWAYS.search(name) and (isinstance(value, int) or (value is None and not NONE_STAYS.search(name)))
        if of_experts or (isinstance(value, int) and value > size):
            setattr(config, name, size)
    for name, token in (("pad_token_id", 0), ("bos_token_id", 1), ("eos_token_id", 2)):
        setattr(config, name, token)
    for number, name in enumerate(sorted(name for name in vars(config) if name.endswith("_token_id"))):
        if isinstance(value := getattr(config, name), int) and value >= VOCABULARY:
            setattr(config, name, VOCABULARY - 1 - number)
    if hasattr(config, "enable_moe_block"):
        config.enable_moe_block = True
    if hasattr(config, "is_moe"):
        config.is_moe = True
    types = vars(config).get("layer_types")
    if types and set(types) == {"linear_attention"}:
        config.layer_types = [*types[:-1], "full_attention"]  # a cache needs a layer that can tell its length
    if "qk_head_dim" in vars(config):
        config.qk_head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim


KINDS = ("causal", "encoder-decoder", "multimodal", "other")


def model_class(config: PreTrainedConfig) -> tuple[type[PreTrainedModel], str]:
    """Return the class to build for a configuration, with a language model's head if there is one, and its kind."""
    parts = [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
    order = {"causal": CAUSAL, "encoder-decoder": ENCODER_DECODER, "multimodal": MULTIMODAL, "other": OTHER}
    kinds = ("multimodal", "causal", "encoder-decoder", "other") if parts else KINDS
    for kind in kinds:
        for mapping in order[kind]:
            name = getattr(modeling_auto, mapping, {}).get(config.model_type)
            if name is not None:
                found = kind if parts or kind != "multimodal" else "causal"
                return getattr(transformers, name if isinstance(name, str) else name[0]), found
    raise LookupError(f"no model class of its own for {config.model_type}")


def build(model_type: str, rows: int = 2, tokens: int = 17) -> tuple[PreTrainedModel, dict[str, torch.Tensor], str]:
    """Return a model in evaluation mode, text to run it on, and its kind."""
    torch.manual_seed(0)
    config = tiny_config(model_type)
    kind_class, kind = model_class(config)
    model = kind_class(config).eval()
    ids = torch.randint(3, VOCABULARY // 2, (rows, tokens))
    inputs = {"input_ids": ids}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids.flip(0)
    return model, inputs, kind


@cache
def _parts() -> frozenset[str]:
    """Return the model types that are inside the default configuration of another one."""
    found: set[str] = set()
    for model_type in moe_model_types():
        with suppress(Exception):
            found |= {config.model_type for config in list(_configs(CONFIG_MAPPING[model_type]()))[1:]}
    return frozenset(found)


def is_part_of_another(model_type: str) -> bool:
    """Return whether a model type has no language model of its own and is inside another one's configuration."""
    if model_type not in _parts():
        return False
    with suppress(Exception):
        return model_class(CONFIG_MAPPING[model_type]())[1] == "other"
    return True
