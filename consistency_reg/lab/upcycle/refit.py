"""Refit what a mixture's experts write, in closed form, so that few of them make up for those that are left out."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from consistency_reg.optional import require

with require("transformers"):
    from transformers import PreTrainedModel
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock


@torch.no_grad()
def refit(
    dense: PreTrainedModel,
    mixture: PreTrainedModel,
    rows: Sequence[Tensor],
    ridge: float = 1e-2,
    autocast: torch.dtype | None = None,
) -> dict[int, float]:
    """Replace the output projections of a mixture's experts by the least-squares ones, layer after layer.

    Which experts a token gets is left as it is. With A [N, F] what the neurons of the chosen experts hold, times the
    router's weights, W the projections side by side and R [N, H] what is missing until the residual stream is the
    dense model's, each layer adds the solution D of ``min |A D - R|^2 + ridge * mean(diag(A'A)) * |D|^2`` to W.
    Later layers see what earlier ones have become, and make up for what those could not.

    Args:
        dense: the model that the mixture was made from by :func:`~consistency_reg.lab.upcycle.convert.upcycle`.
        mixture: it; changed in place.
        rows: [T] token ids each, of any length: the calibration text.
        ridge: pulls towards the projections as they are.
        autocast: the type that matrices are multiplied in; that of the weights when None.

    Returns:
        for each layer that is a mixture, the squared error of the residual stream after it over that before the refit.

    Raises:
        ValueError: no row, a ridge that is not positive.
    """
    if not rows:
        raise ValueError("rows must hold at least one row of token ids, got none")
    if not ridge > 0:
        raise ValueError(f"ridge must be positive, got {ridge}")
    left = {}
    wanted = [dense.get_input_embeddings()(row[None].to(dense.device)).float() for row in rows]
    streams = wanted
    own: Any = mixture.get_submodule("model.layers")
    theirs: Any = dense.get_submodule("model.layers")
    for index, (layer, teacher) in enumerate(zip(own, theirs, strict=True)):
        with _autocast(dense, autocast):
            turned, same = isinstance(layer.mlp, Qwen2MoeSparseMoeBlock), streams is wanted
            rotary = [_rotary(dense, hidden) for hidden in wanted]
            wanted = [_whole(teacher, *pair) for pair in zip(wanted, rotary, strict=True)]
            if same and not turned:  # below the first mixture both models are one
                streams = wanted
                continue
            middle = [_attended(layer, *pair) for pair in zip(streams, rotary, strict=True)]
            if turned:
                left[index] = _refit_layer(layer, middle, wanted, ridge)
            streams = [hidden + layer.mlp(layer.post_attention_layernorm(hidden)) for hidden in middle]
    return left


def _refit_layer(layer: Any, middle: Sequence[Tensor], wanted: Sequence[Tensor], ridge: float) -> float:
    """Refit one block on the residual stream before it and that wanted after it; return the share of error left."""
    weights = _projections(layer.mlp)
    gram = weights.new_zeros(len(weights), len(weights))
    held, before = torch.zeros_like(weights), 0.0
    for hidden, target in zip(middle, wanted, strict=True):
        written = chosen_neurons(layer.mlp, layer.post_attention_layernorm(hidden)[0])
        with torch.autocast(hidden.device.type, enabled=False):
            missing = (target - hidden)[0].float() - written @ weights
            gram += written.T @ written
            held += written.T @ missing
            before += float(missing.square().sum())
    with torch.autocast(gram.device.type, enabled=False):
        damped = gram.double()
        damped.diagonal().add_(ridge * damped.diagonal().mean().clamp_min(1e-12))
        change = torch.linalg.solve(damped, held.double()).float()
        _set_projections(layer.mlp, weights + change)
        after = before - float(2 * (change * held).sum() - (change * (gram @ change)).sum())
    return max(after, 0.0) / before if before else 1.0


def chosen_neurons(block: Any, inputs: Tensor) -> Tensor:
    """Return what the neurons of a block hold on each token, zero where they are in no chosen expert.

    Args:
        block: a ``Qwen2MoeSparseMoeBlock``.
        inputs: [N, H].

    Returns:
        [N, E * F + S] float32: the F neurons of each of the E experts, times the router's weight, then the S shared
        ones, times their gate.
    """
    _, weights, ids = block.gate(inputs)
    experts, shared = block.experts, block.shared_expert
    share = inputs.new_zeros(len(inputs), experts.num_experts, dtype=torch.float32).scatter(1, ids, weights.float())
    gate, up = (inputs @ experts.gate_up_proj.flatten(0, 1).T).unflatten(1, (experts.num_experts, 2, -1)).unbind(2)
    routed = (experts.act_fn(gate) * up).float() * share[..., None]
    always = shared.act_fn(shared.gate_proj(inputs)) * shared.up_proj(inputs)
    return torch.cat([routed.flatten(1), (always * block.shared_expert_gate(inputs).sigmoid()).float()], dim=1)


def _projections(block: Any) -> Tensor:
    """[E * F + S, H] float32: the output projections side by side, as :func:`chosen_neurons` orders the neurons."""
    routed = block.experts.down_proj.transpose(1, 2).flatten(0, 1)
    return torch.cat([routed, block.shared_expert.down_proj.weight.T]).float()


def _set_projections(block: Any, weights: Tensor) -> None:
    down = block.experts.down_proj
    routed, shared = weights.split([down.shape[0] * down.shape[2], len(weights) - down.shape[0] * down.shape[2]])
    down.copy_(routed.unflatten(0, (down.shape[0], down.shape[2])).transpose(1, 2))
    block.shared_expert.down_proj.weight.copy_(shared.T)


def _rotary(model: PreTrainedModel, hidden: Tensor) -> tuple[Tensor, Tensor]:
    positions = torch.arange(hidden.shape[1], device=hidden.device)
    return model.get_submodule("model.rotary_emb")(hidden, positions[None])


def _attended(layer: Any, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Return the residual stream between the attention of a layer and its MLP."""
    out, _ = layer.self_attn(layer.input_layernorm(hidden), position_embeddings=rotary, attention_mask=None)
    return hidden + out


def _whole(layer: Any, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    return layer(hidden, position_embeddings=rotary, attention_mask=None)


def _autocast(model: PreTrainedModel, dtype: torch.dtype | None) -> AbstractContextManager[None]:
    return torch.autocast(model.device.type, dtype=dtype, enabled=dtype is not None)
