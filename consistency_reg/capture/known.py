"""The routers of transformers >= 5 that the capture knows by itself.

Most return ``(logits, weights, ids)`` and select by their logits or, with a correction bias, by weights plus bias:
the last of :data:`DEFAULT_ADAPTERS`. What is different about the others stands here. docs/architectures.md lists the
models.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from consistency_reg.capture.adapters import RouterAdapter
from consistency_reg.capture.selection import biased_weights, in_best_groups, members, selection_scores
from consistency_reg.capture.weighing import Rerouted, RouterCall, Weighing


@dataclass(frozen=True)
class BiasGiven(RouterAdapter):
    """Reads a router whose block owns the correction bias, and gives it to the router next to the hidden states."""

    score_function: str | None = "sigmoid"

    def read_scores(self, router: nn.Module, logits: Tensor, expert_ids: Tensor, given: tuple[Any, ...]) -> Tensor:
        """Return weights plus bias; the logits where no bias was given."""
        bias = next((value for value in given if isinstance(value, Tensor)), None)
        return logits if bias is None else biased_weights(logits, bias, self.read_score_function(router))

    def logits_of(self, router: nn.Module, inputs: Tensor) -> Tensor:
        """Return the logits, in which the bias has no part."""
        no_bias = inputs.new_zeros(router.num_experts)  # type: ignore[call-overload]
        return self.read(router, router(inputs, no_bias))[0]


@dataclass(frozen=True)
class BiasGivenRows(BiasGiven):
    """Reads a router that takes rows [B, T, H], and a correction bias from its block."""

    def logits_of(self, router: nn.Module, inputs: Tensor) -> Tensor:
        """Return one row of logits."""
        return super().logits_of(router, inputs[None])


@dataclass(frozen=True)
class TableRouter(RouterAdapter):
    """Reads a router that chooses by a table of token ids: a loss on its scores has no gradient."""

    def read_scores(self, router: nn.Module, logits: Tensor, expert_ids: Tensor, given: tuple[Any, ...]) -> Tensor:
        """Return 1 for the experts that the table names and 0 for the others."""
        return members(expert_ids, logits.shape[-1])

    def logits_of(self, router: nn.Module, inputs: Tensor) -> Tensor:
        """Return the logits, in which the token has no part."""
        return self.read(router, router(inputs, torch.zeros(len(inputs), dtype=torch.int64, device=inputs.device)))[0]


@dataclass(frozen=True)
class ContextRouter(RouterAdapter):
    """Reads a router whose logits depend on more than its own input."""

    def logits_of(self, router: nn.Module, inputs: Tensor) -> Tensor:
        """Raise ValueError: the logits of other inputs cannot be computed."""
        raise ValueError(f"{type(router).__name__} routes by more than its own input: it has no reference to anchor to")


def best_groups_of_one(router: nn.Module, logits: Tensor) -> Tensor:
    """Return the scores of DeepSeek-V2: of the groups whose best expert is highest, if it limits groups at all."""
    if router.topk_method != "group_limited_greedy":
        return logits
    return in_best_groups(logits, router.num_group, router.topk_group, best_of=1)  # type: ignore[arg-type]


def best_groups_of_softmax(router: nn.Module, logits: Tensor) -> Tensor:
    """Return the scores of Mistral 4: a softmax, then the groups whose two best experts have the highest sum."""
    return in_best_groups(logits.softmax(dim=-1), router.num_group, router.topk_group)  # type: ignore[arg-type]


def groups_at_zero(router: nn.Module, logits: Tensor) -> Tensor:
    """Return the scores of A.X K2: DeepSeek-V3's, but experts outside the best groups score 0, not minus infinity."""
    scores = biased_weights(logits, router.e_score_correction_bias, "sigmoid")  # type: ignore[arg-type]
    if router.num_group is None:
        return scores
    return in_best_groups(scores, router.num_group, router.topk_group, outside=0.0)  # type: ignore[arg-type]


def softmax_plus_bias(router: nn.Module, logits: Tensor) -> Tensor:
    """Return the scores of LongCat-Flash and of Ernie 4.5, which keeps its bias in a module of its own."""
    owner = getattr(router, "moe_statics", router)
    return biased_weights(logits, owner.e_score_correction_bias, "softmax")  # type: ignore[arg-type]


def logits_plus_bias(router: nn.Module, logits: Tensor) -> Tensor:
    """Return the scores of Kolibri: logits plus a bias."""
    return logits + router.e_score_correction_bias.detach()  # type: ignore[operator]


def zaya_scores(router: nn.Module, logits: Tensor) -> Tensor:
    """Return the scores of Zaya: a softmax plus a bias of another name."""
    return biased_weights(logits, router.balancing_biases, "softmax")  # type: ignore[arg-type]


def zaya_ids(output: Any) -> Tensor:
    """Return the ids of Zaya, whose last class skips the experts; the router returns it as expert 0 with weight 0."""
    logits, weights, expert_ids = output[:3]
    return expert_ids.masked_fill(weights == 0, logits.shape[-1] - 1)


def log_probabilities(output: Any) -> Tensor:
    """Return Gemma 4's logits up to a constant of each token: logarithms of the probabilities that it returns."""
    probabilities = output[0]
    return probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()


def doge_logits(output: Any) -> Tensor:
    """Return the logits of Doge, whose experts are cells of a grid: the sum of a row's and a column's logit each."""
    rows, columns = output[1]
    return (rows[:, :, None] + columns[:, None, :]).flatten(-2)


@dataclass(frozen=True)
class SwitchRouter(RouterAdapter):
    """Reads ``(mask [B, T, E], weight [B, T, 1], logits)``; the mask lacks tokens beyond an expert's capacity."""

    def reroute(self, call: RouterCall, expert_ids: Tensor, weights: Tensor) -> Rerouted:
        """Return the router's output with the mask of another choice, within the capacity."""
        mask, weight, logits = call.output
        chosen = nn.functional.one_hot(expert_ids.view(mask.shape[:-1]), mask.shape[-1])
        router: Any = call.router
        within = chosen.cumsum(dim=-2) <= router.expert_capacity
        return Rerouted((chosen * within, weights.view(weight.shape).to(weight.dtype), logits), expert_ids)


@dataclass(frozen=True)
class Llama4Router(RouterAdapter):
    """Reads ``(weights [N, E], logits)``; the weights are 0 for experts that were not chosen."""

    def own_weights(self, call: RouterCall, expert_ids: Tensor) -> Tensor:
        """Return the weights of the chosen experts, those that are not 0."""
        return call.output[0].gather(-1, expert_ids)

    def reroute(self, call: RouterCall, expert_ids: Tensor, weights: Tensor) -> Rerouted:
        """Return the router's output with the weights of another choice."""
        own, logits = call.output
        return Rerouted((torch.zeros_like(own).scatter(-1, expert_ids, weights.to(own.dtype)), logits), expert_ids)


@dataclass(frozen=True)
class JetMoeRouter(RouterAdapter):
    """Reads ``(order of the accesses by expert, their tokens, their weights, tokens of each expert, logits)``."""

    def own_weights(self, call: RouterCall, expert_ids: Tensor) -> Tensor:
        """Return the router's own weights in the order of the tokens."""
        order, _, weights, *_ = call.output
        return torch.empty_like(weights).scatter(0, order, weights).view(expert_ids.shape)

    def reroute(self, call: RouterCall, expert_ids: Tensor, weights: Tensor) -> Rerouted:
        """Return the router's output with the order of another choice."""
        logits = call.output[-1]
        order = expert_ids.flatten().sort(0).indices  # as the router sorts them
        tokens = order.div(expert_ids.shape[-1], rounding_mode="trunc")
        counts = expert_ids.flatten().bincount(minlength=logits.shape[-1]).tolist()
        ordered = weights.flatten()[order].to(call.output[2].dtype)
        return Rerouted((order, tokens, ordered, counts, logits), expert_ids)


@dataclass(frozen=True)
class InklingRouter(RouterAdapter):
    """Reads ``(logits, weights, ids, weights of shared experts)``, where all weights have one sum."""

    def reroute(self, call: RouterCall, expert_ids: Tensor, weights: Tensor) -> Rerouted:
        """Return the output for another choice; the sum stays, so shared experts gain what the chosen ones lose."""
        logits, own_weights, own_ids, shared = call.output
        sigmoids = call.logits.sigmoid()
        total = sigmoids.gather(-1, own_ids).sum(dim=-1, keepdim=True) + _shared_sigmoids(call).sum(-1, keepdim=True)
        new_total = total - sigmoids.gather(-1, own_ids).sum(-1, keepdim=True)
        new_total = new_total + sigmoids.gather(-1, expert_ids).sum(dim=-1, keepdim=True)
        shared = (shared.float() * total / new_total).to(shared.dtype)
        output = (logits, weights.to(own_weights.dtype), expert_ids.to(own_ids.dtype), shared)
        return Rerouted(output, expert_ids)


def _shared_sigmoids(call: RouterCall) -> Tensor:
    router: Any = call.router
    hidden = call.args[0].reshape(-1, router.hidden_dim).float()
    return torch.nn.functional.linear(hidden, router.weight[-router.n_shared_experts :].float()).sigmoid()


def inkling_weights(call: RouterCall, expert_ids: Tensor) -> Tensor:
    """Return the weights of Inkling: shares of the sigmoids of chosen and shared experts together."""
    router: Any = call.router
    weights = call.logits.sigmoid().gather(-1, expert_ids)
    total = weights.sum(dim=-1, keepdim=True) + _shared_sigmoids(call).sum(dim=-1, keepdim=True)
    return weights / total * router.route_scale * router.global_scale.float()


def gemma_weights(call: RouterCall, expert_ids: Tensor) -> Tensor:
    """Return the weights of Gemma 4: normalized, times a scale of each expert."""
    return Weighing(normalized=True)(call, expert_ids) * call.router.per_expert_scale[expert_ids]  # type: ignore[index]


def privacy_filter_weights(call: RouterCall, expert_ids: Tensor) -> Tensor:
    """Return the weights of OpenAI's privacy filter: normalized, divided by K."""
    return Weighing(normalized=True)(call, expert_ids) / expert_ids.shape[-1]


def dbrx_weights(call: RouterCall, expert_ids: Tensor) -> Tensor:
    """Return the weights of DBRX: divided by their norm, whose order the block knows."""
    weights = Weighing(normalized=False)(call, expert_ids)
    order: Any = call.block.moe_normalize_expert_weights
    return weights if order is None else weights / weights.norm(p=order, dim=-1, keepdim=True)


def cohere_weights(call: RouterCall, expert_ids: Tensor) -> Tensor:
    """Return the weights of Cohere 2: a softmax over the chosen, or sigmoids, normalized if the router says so."""
    return Weighing(normalized=True if call.score_function == "softmax" else None)(call, expert_ids)


def ernie_weights(call: RouterCall, expert_ids: Tensor) -> Tensor:
    """Return the weights of Ernie 4.5: divided by their sum or a least value, whichever is higher."""
    weights = Weighing(normalized=False)(call, expert_ids)
    return weights / weights.sum(dim=-1, keepdim=True).clamp_min(call.router.norm_min)  # type: ignore[arg-type]


@dataclass(frozen=True)
class ZayaRouter(ContextRouter):
    """Reads a router whose last class skips the experts, and is handed on as expert 0 with weight 0."""

    def own_weights(self, call: RouterCall, expert_ids: Tensor) -> Tensor:
        """Return the router's own weights, 0 where the experts are skipped."""
        return call.output[1]

    def reroute(self, call: RouterCall, expert_ids: Tensor, weights: Tensor) -> Rerouted:
        """Return the router's output for another choice, 0 where the experts are skipped."""
        logits, own_weights, _, states = call.output
        handed_on = expert_ids.masked_fill(_skips(call, expert_ids), 0)
        return Rerouted((logits, weights.to(own_weights.dtype), handed_on, states), expert_ids)


def _skips(call: RouterCall, expert_ids: Tensor) -> Tensor:
    return expert_ids == call.logits.shape[-1] - 1


def zaya_weights(call: RouterCall, expert_ids: Tensor) -> Tensor:
    """Return the weights of Zaya: a softmax, 0 for skipping the experts."""
    return Weighing(normalized=False)(call, expert_ids).masked_fill(_skips(call, expert_ids), 0)


NORMALIZED, AS_THEY_ARE = Weighing(normalized=True), Weighing(normalized=False)
SCALED = Weighing(scale="routed_scaling_factor", epsilon=1e-20)

DEFAULT_ADAPTERS = (
    # Their masks lack the tokens beyond an expert's capacity: what was chosen for those is in the logits alone.
    SwitchRouter(r"^SwitchTransformersTop1Router$", logits=2, top_k=1, weights=AS_THEY_ARE),
    RouterAdapter(
        r"^NllbMoeTop2Router$", logits=2, top_k=2, fixed="the installed experts do not follow the choice of the router"
    ),
    Llama4Router(r"^Llama4Router$", logits=1, top_k="top_k", score_function="sigmoid", weights=AS_THEY_ARE),
    JetMoeRouter(r"^JetMoeTopKGating$", logits=4, top_k="top_k", weights=NORMALIZED),
    RouterAdapter(r"^DbrxRouter$", logits=None, expert_ids=None, weights=dbrx_weights),
    RouterAdapter(r"^(Diffusion)?Gemma\d*TextRouter$", logits=log_probabilities, weights=gemma_weights),
    ContextRouter(
        r"^DogeCDMoE$",
        logits=doge_logits,
        top_k="top_k",
        fixed="router and experts are one module, and its logits mix the tokens of a batch",
    ),
    ZayaRouter(
        r"^ZayaRouter$", expert_ids=zaya_ids, scores=zaya_scores, score_function="softmax", weights=zaya_weights
    ),
    TableRouter(r"^DeepseekV4HashRouter$", fixed="a table of token ids makes the choice, not scores"),
    RouterAdapter(
        r"^PhimoeTopKRouter$",
        fixed="it weighs experts within a margin around the best alone, so that another choice has no weight",
    ),
    BiasGivenRows(r"^AfmoeTokenChoiceRouter$", weights=Weighing(True, "route_scale", 1e-20)),
    BiasGiven(r"^(Dots3NoteVision|HYV3)TopKRouter$", weights=Weighing(True, "router_scaling_factor", 1e-20)),
    BiasGiven(r"^Lfm2MoeTopKRouter$", weights=Weighing(None, "routed_scaling_factor", 1e-6)),
    BiasGiven(r"^MiniMaxM2TopKRouter$", weights=NORMALIZED),
    RouterAdapter(
        r"^(DeepseekV2|DeepseekOcr2Text|UnlimitedOcrText)TopkRouter$",
        scores=best_groups_of_one,
        weights=Weighing(False, "routed_scaling_factor"),
    ),
    RouterAdapter(r"^(Mistral4|MistralLarge4Text)TopkRouter$", scores=best_groups_of_softmax, weights=SCALED),
    RouterAdapter(r"^AXK2TopkRouter$", scores=groups_at_zero, weights=SCALED),
    RouterAdapter(
        r"^LongcatFlashTopkRouter$",
        scores=softmax_plus_bias,
        score_function="softmax",
        weights=Weighing(False, "routed_scaling_factor"),
    ),
    RouterAdapter(
        r"^Ernie4_5_\w*TopKRouter$", scores=softmax_plus_bias, score_function="softmax", weights=ernie_weights
    ),
    RouterAdapter(
        r"^Kolibri1TopKRouter$",
        scores=logits_plus_bias,
        score_function="sigmoid",
        weights=Weighing(),
    ),
    RouterAdapter(r"^FlintTopKRouter$", score_function="sigmoid", weights=Weighing()),
    RouterAdapter(r"^OpenAIPrivacyFilterTopKRouter$", weights=privacy_filter_weights),
    RouterAdapter(r"^Cohere2MoeTopKRouter$", weights=cohere_weights),
    RouterAdapter(r"^JambaTopKRouter$", weights=AS_THEY_ARE),
    InklingRouter(r"^InklingTopkRouter$", weights=inkling_weights),
    RouterAdapter(r"^(Laguna|MiniMaxM3VL|Step3p7)TopKRouter$", weights=NORMALIZED),
    RouterAdapter(r"^BeamTopKRouter$", weights=Weighing(epsilon=1e-20)),
    RouterAdapter(r"Top[kK]Router$|^HunYuanMoEV1Gate$", scores=selection_scores, weights=SCALED),
)
