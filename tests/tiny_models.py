"""Tiny transformers models of every kind that the capture knows by itself, with random weights and no download."""

import torch
import transformers

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
E, K = 8, 2


def configs():
    """Return a configuration of each kind by its short name: 2 layers, E = 8, K = 2; DeepSeek-V3's first is dense."""
    return {
        "olmoe": transformers.OlmoeConfig(**COMMON, num_experts=E, num_experts_per_tok=K),
        "mixtral": transformers.MixtralConfig(**COMMON, num_local_experts=E, num_experts_per_tok=K),
        "qwen2_moe": transformers.Qwen2MoeConfig(
            **COMMON, num_experts=E, num_experts_per_tok=K, moe_intermediate_size=8, shared_expert_intermediate_size=8
        ),
        "qwen3_moe": transformers.Qwen3MoeConfig(
            **COMMON, num_experts=E, num_experts_per_tok=K, moe_intermediate_size=8, head_dim=16
        ),
        "granite_moe_shared": transformers.GraniteMoeSharedConfig(
            **COMMON, num_local_experts=E, num_experts_per_tok=K, shared_intermediate_size=8
        ),
        "deepseek_v3": transformers.DeepseekV3Config(
            **COMMON,
            n_routed_experts=E,
            num_experts_per_tok=K,
            moe_intermediate_size=8,
            n_group=4,
            topk_group=2,
            first_k_dense_replace=1,
            q_lora_rank=8,
            kv_lora_rank=8,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
        ),
    }


KINDS = ("olmoe", "mixtral", "qwen2_moe", "qwen3_moe", "granite_moe_shared", "deepseek_v3")


def tiny_model(kind, seed=0):
    """Return the causal language model of a kind; DeepSeek-V3's correction bias is not zero, as after training."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(configs()[kind])
    for module in model.modules():
        if hasattr(module, "e_score_correction_bias"):
            module.e_score_correction_bias.normal_(std=0.03)  # as wide as the sigmoids
    return model


def token_ids(rows, tokens, seed=0):
    """Return [rows, tokens] ids, none of them special."""
    return torch.randint(3, COMMON["vocab_size"], (rows, tokens), generator=torch.Generator().manual_seed(seed))
