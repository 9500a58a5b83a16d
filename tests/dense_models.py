"""Tiny dense models, and the mixtures that they become."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from consistency_reg.lab.upcycle.convert import mlp_inputs, upcycle

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,
}


def llama(**options):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES | options)).eval()


def qwen2():
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**SIZES)).eval()


def text(rows=4, length=40):
    return torch.randint(61, (rows, length), generator=torch.Generator().manual_seed(1))


def turned(dense, plan):
    layers = plan.layers or range(dense.config.num_hidden_layers)
    return upcycle(dense, plan, mlp_inputs(dense, list(text()), layers))


@torch.no_grad()
def logits(model):
    return model(text(2)).logits
