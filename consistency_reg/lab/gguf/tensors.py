"""Give the weights of a model under llama.cpp's names and in its order of rows."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor


def tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the weights of each tensor of a GGUF file.

    Args:
        model: a GraniteMoe or GraniteMoeShared of transformers, in memory.
    """
    yield "token_embd.weight", model.model.embed_tokens.weight
    for number, layer in enumerate(model.model.layers):
        for name, weights in _layer(layer, model.config):
            yield f"blk.{number}.{name}.weight", weights
    yield "output_norm.weight", model.model.norm.weight
    if not model.config.tie_word_embeddings:
        yield "output.weight", model.lm_head.weight


def _layer(layer: Any, config: Any) -> Iterator[tuple[str, Tensor]]:
    attention, moe = layer.self_attn, layer.block_sparse_moe
    yield "attn_norm", layer.input_layernorm.weight
    yield "attn_q", rotary_pairs(attention.q_proj.weight, config.num_attention_heads)
    yield "attn_k", rotary_pairs(attention.k_proj.weight, config.num_key_value_heads)
    yield "attn_v", attention.v_proj.weight
    yield "attn_output", attention.o_proj.weight
    yield "ffn_norm", layer.post_attention_layernorm.weight
    yield "ffn_gate_inp", moe.router.weight
    gate, up = moe.experts.gate_up_proj.chunk(2, dim=1)
    yield from (("ffn_gate_exps", gate), ("ffn_up_exps", up), ("ffn_down_exps", moe.experts.down_proj))
    if (shared := getattr(layer, "shared_mlp", None)) is not None:
        gate, up = shared.input_linear.weight.chunk(2)
        yield from (("ffn_gate_shexp", gate), ("ffn_up_shexp", up), ("ffn_down_shexp", shared.output_linear.weight))


def rotary_pairs(weights: Tensor, heads: int) -> Tensor:
    """Reorder the rows of each head so that the two numbers that one angle turns are neighbours.

    transformers turns row i of a head together with row i + half of the head; llama.cpp row 2i with row 2i + 1.

    Args:
        weights: [heads * D, H] of queries or keys.
        heads: their number.

    Example: one head of four rows

        >>> import torch
        >>> rotary_pairs(torch.arange(4)[:, None], heads=1).flatten().tolist()
        [0, 2, 1, 3]
    """
    rows, hidden = weights.shape
    return weights.reshape(heads, 2, rows // heads // 2, hidden).transpose(1, 2).reshape(rows, hidden)
