"""Build a mixture of experts from a dense model: which weights go where."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from consistency_reg.lab.upcycle.neurons import balanced_clusters, neuron_strength, router_weights
from consistency_reg.optional import require

with require("transformers"):
    from transformers import PreTrainedModel, Qwen2MoeConfig, Qwen2MoeForCausalLM
    from transformers.activations import ACT2FN

QKV_BIAS = {"llama": False, "qwen2": True}  # the families that can be turned, by their model_type
KEPT = (  # settings that a dense config and the mixture's have in common
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range"),
    *("rms_norm_eps", "rope_parameters", "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id"),
)


@dataclass(frozen=True)
class Plan:
    """Says how a dense MLP becomes a mixture of experts.

    Attributes:
        splits: parts of equal size that the neurons are split into; 1 copies the MLP whole.
        copies: how often the neurons are split, each time into other groups. The mixture has splits * copies experts.
        top_k: K, experts that a token uses.
        shared: share of the neurons that every token uses, the strongest ones; 0 for no shared expert.
        layers: which layers are turned; all when None.
        router_scale: standard deviation of the router's logits at first.
        seed: of the clustering.

    Raises:
        ValueError: a number below 1, more active experts than there are, a share outside of [0, 1).
    """

    splits: int = 8
    copies: int = 1
    top_k: int = 4
    shared: float = 0.0
    layers: tuple[int, ...] | None = None
    router_scale: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("splits", "copies", "top_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k must be at most splits * copies = {self.num_experts}, got {self.top_k}")
        if not 0 <= self.shared < 1:
            raise ValueError(f"shared must be a share in [0, 1), got {self.shared}")
        if self.router_scale < 0:
            raise ValueError(f"router_scale must be at least 0, got {self.router_scale}")

    @property
    def num_experts(self) -> int:
        """The number of experts of the mixture, ``splits * copies``."""
        return self.splits * self.copies

    @property
    def routed_scale(self) -> int:
        """The factor of the experts' outputs: the router's K weights add up to 1, the parts of an MLP do not."""
        return min(self.top_k, self.splits)

    def sizes(self, neurons: int) -> tuple[int, int]:
        """Return the neurons of one routed expert and of the shared one.

        Raises:
            ValueError: the routed neurons cannot be split into equal parts.
        """
        shared = round(self.shared * neurons)
        if (neurons - shared) % self.splits:
            raise ValueError(
                f"splits must divide the {neurons - shared} routed neurons of a layer ({neurons} less {shared} shared "
                f"ones), got {self.splits}"
            )
        return (neurons - shared) // self.splits, shared


def upcycle(dense: PreTrainedModel, plan: Plan, inputs: Mapping[int, Tensor]) -> Qwen2MoeForCausalLM:
    """Return a mixture of experts that computes what a dense model computes, as far as its experts are active.

    With every expert active and ``router_scale`` 0, and with ``splits=1`` whatever is active, the logits are the dense
    model's. The mixture is a ``Qwen2MoeForCausalLM``; where there is no shared expert its shared part has no neurons.

    Args:
        dense: a causal model of a family in :data:`QKV_BIAS`.
        plan: how its MLPs are turned.
        inputs: for each layer that is turned, [N, H] hidden states that its MLP gets on a calibration text.

    Raises:
        ValueError: another family, biases that the mixture has no place for, layers that are not there, an MLP that
            cannot be split so.
    """
    layers = turned_layers(dense.config, plan)
    size, shared = plan.sizes(dense.config.intermediate_size)
    config = _config(dense, plan, layers, size, shared)
    state = dict(dense.state_dict())
    for index in layers:
        prefix = f"model.layers.{index}.mlp."
        mlp = {name: state.pop(f"{prefix}{name}_proj.weight").float() for name in ("gate", "up", "down")}
        built = _layer(mlp, plan, inputs[index].float(), shared, ACT2FN[config.hidden_act], plan.seed + index)
        state |= {prefix + name: weights.to(dense.dtype) for name, weights in built.items()}
    model = Qwen2MoeForCausalLM(config)
    nn.Module.to(model, dense.dtype)
    model.load_state_dict(state)
    model.tie_weights()
    model.generation_config = dense.generation_config
    return model.eval()


def turned_layers(config: Any, plan: Plan) -> list[int]:
    """Return the numbers of the layers that a plan turns in a dense model of a configuration, in their order.

    Raises:
        ValueError: the model cannot be turned so, see :func:`upcycle`.
    """
    if config.model_type not in QKV_BIAS:
        raise ValueError(f"the dense model must be one of {sorted(QKV_BIAS)}, got {config.model_type!r}")
    if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
        raise ValueError("the dense model must have no bias in its output projections, got attention_bias or mlp_bias")
    if getattr(config, "use_sliding_window", False):
        raise ValueError("the dense model must attend to its whole context, got use_sliding_window")
    layers = tuple(range(config.num_hidden_layers)) if plan.layers is None else plan.layers
    if not layers or not set(layers) <= set(range(config.num_hidden_layers)):
        raise ValueError(f"layers must be some of 0..{config.num_hidden_layers - 1}, got {list(layers)}")
    plan.sizes(config.intermediate_size)
    return sorted(set(layers))


def _config(dense: PreTrainedModel, plan: Plan, layers: Sequence[int], size: int, shared: int) -> Qwen2MoeConfig:
    kept: dict[str, Any] = {name: value for name in KEPT if (value := getattr(dense.config, name, None)) is not None}
    return Qwen2MoeConfig(
        **kept,
        qkv_bias=QKV_BIAS[dense.config.model_type],
        mlp_only_layers=[index for index in range(dense.config.num_hidden_layers) if index not in layers],
        num_experts=plan.num_experts,
        num_experts_per_tok=plan.top_k,
        moe_intermediate_size=size,
        shared_expert_intermediate_size=shared,
        norm_topk_prob=True,
    )


def _layer(
    mlp: Mapping[str, Tensor],
    plan: Plan,
    inputs: Tensor,
    shared: int,
    activation: nn.Module,
    seed: int,
) -> dict[str, Tensor]:
    """Return the weights of one block by their names in it."""
    strength = neuron_strength(mlp["gate"], mlp["up"], mlp["down"], activation, inputs)
    strongest = strength.mean(dim=0).argsort(descending=True, stable=True)
    always, routed = strongest[:shared].sort().values, strongest[shared:].sort().values
    generator = torch.Generator().manual_seed(seed)
    groups: list[Tensor] = []
    for copy in range(plan.copies):  # each copy is clustered on another part of the text
        part = balanced_clusters(strength[copy :: plan.copies, routed].T, plan.splits, generator)
        groups += [routed[part == index] for index in range(plan.splits)]
    expert_strength = torch.stack([strength[:, group].square().sum(dim=1).sqrt() for group in groups], dim=1)
    return {
        "gate.weight": router_weights(inputs, expert_strength, plan.router_scale),
        "experts.gate_up_proj": torch.stack([torch.cat([mlp["gate"][group], mlp["up"][group]]) for group in groups]),
        "experts.down_proj": torch.stack([mlp["down"][:, group] * plan.routed_scale for group in groups]),
        "shared_expert.gate_proj.weight": mlp["gate"][always],
        "shared_expert.up_proj.weight": mlp["up"][always],
        "shared_expert.down_proj.weight": mlp["down"][:, always] * 2,  # its gate, sigmoid(0), is a half
        "shared_expert_gate.weight": torch.zeros(1, inputs.shape[1]),
    }


@torch.no_grad()
def mlp_inputs(dense: PreTrainedModel, rows: Sequence[Tensor], layers: Sequence[int]) -> dict[int, Tensor]:
    """Return what the MLPs of some layers are given on a text.

    Args:
        dense: the model.
        rows: [T] token ids each, of any length.
        layers: which MLPs.

    Returns:
        for each layer [N, H], N the tokens of all rows.
    """
    found: dict[int, list[Tensor]] = {index: [] for index in layers}

    def keep(index: int, hidden: Tensor) -> None:
        found[index].append(hidden.flatten(0, -2).float())

    blocks: Any = dense.get_submodule("model.layers")
    handles = [
        blocks[index].mlp.register_forward_pre_hook(lambda _, args, index=index: keep(index, args[0]))
        for index in layers
    ]
    try:
        for row in rows:
            dense.get_submodule("model")(row[None].to(dense.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {index: torch.cat(parts) for index, parts in found.items()}
