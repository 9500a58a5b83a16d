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


@dataclass(frozen=True)
class BiasGiven(RouterAdapter):
    """The correction bias belongs to the block, which gives it to the router's forward beside the hidden states."""

    score_function: str | None = "sigmoid"

    def read_scores(self, router: nn.Module, logits: Tensor, expert_ids: Tensor, given: tuple[Any, ...]) -> Tensor:
        """Weights plus bias; the logits where no bias was given."""
        bias = next((value for value in given if isinstance(value, Tensor)), None)
        return logits if bias is None else biased_weights(logits, bias, self.read_score_function(router))

    def logits_of(self, router: nn.Module, inputs: Tensor) -> Tensor:
        """The bias has no part in the logits."""
        no_bias = inputs.new_zeros(router.num_experts)  # type: ignore[call-overload]
        return self.read(router, router(inputs, no_bias))[0]


@dataclass(frozen=True)
class BiasGivenRows(BiasGiven):
    """The same for a router that takes rows, [B, T, H]."""

    def logits_of(self, router: nn.Module, inputs: Tensor) -> Tensor:
        """One row of them."""
        return super().logits_of(router, inputs[None])


@dataclass(frozen=True)
class TableRouter(RouterAdapter):
    """The token's id alone decides, by a table: no score moves the choice, so a loss on the scores has no gradient."""

    def read_scores(self, router: nn.Module, logits: Tensor, expert_ids: Tensor, given: tuple[Any, ...]) -> Tensor:
        """1 for the experts that the table names."""
        return members(expert_ids, logits.shape[-1])

    def logits_of(self, router: nn.Module, inputs: Tensor) -> Tensor:
        """The token has no part in the logits."""
        return self.read(router, router(inputs, torch.zeros(len(inputs), dtype=torch.int64, device=inputs.device)))[0]


@dataclass(frozen=True)
class ContextRouter(RouterAdapter):
    """A router whose logits depend on more than its own input."""

    def logits_of(self, router: nn.Module, inputs: Tensor) -> Tensor:
        """Refused."""
        raise ValueError(f"{type(router).__name__} routes by more than its own input: it has no reference to anchor to")


def best_groups_of_one(router: nn.Module, logits: Tensor) -> Tensor:
    """DeepSeek-V2: the experts of the groups whose best expert is highest, if it limits groups at all."""
    if router.topk_method != "group_limited_greedy":
        return logits
    return in_best_groups(logits, router.num_group, router.topk_group, best_of=1)  # type: ignore[arg-type]


def best_groups_of_softmax(router: nn.Module, logits: Tensor) -> Tensor:
    """Mistral 4: softmax, then the groups whose two best experts have the highest sum."""
    return in_best_groups(logits.softmax(dim=-1), router.num_group, router.topk_group)  # type: ignore[arg-type]


def groups_at_zero(router: nn.Module, logits: Tensor) -> Tensor:
    """A.X K2: as DeepSeek-V3, but experts outside the best groups score 0 and not minus infinity."""
    scores = biased_weights(logits, router.e_score_correction_bias, "sigmoid")  # type: ignore[arg-type]
    if router.num_group is None:
        return scores
    return in_best_groups(scores, router.num_group, router.topk_group, outside=0.0)  # type: ignore[arg-type]


def softmax_plus_bias(router: nn.Module, logits: Tensor) -> Tensor:
    """Ernie 4.5 (which keeps its bias in a module of its own) and LongCat-Flash."""
    owner = getattr(router, "moe_statics", router)
    return biased_weights(logits, owner.e_score_correction_bias, "softmax")  # type: ignore[arg-type]


def logits_plus_bias(router: nn.Module, logits: Tensor) -> Tensor:
    """Kolibri."""
    return logits + router.e_score_correction_bias.detach()  # type: ignore[operator]


def zaya_scores(router: nn.Module, logits: Tensor) -> Tensor:
    """Zaya: softmax plus a bias of another name."""
    return biased_weights(logits, router.balancing_biases, "softmax")  # type: ignore[arg-type]


def zaya_ids(output: Any) -> Tensor:
    """Zaya's last class skips the experts; the router hands it on as expert 0 with weight 0."""
    logits, weights, expert_ids = output[:3]
    return expert_ids.masked_fill(weights == 0, logits.shape[-1] - 1)


def log_probabilities(output: Any) -> Tensor:
    """Gemma 4 returns probabilities; their logarithms are its logits up to a constant of each token."""
    probabilities = output[0]
    return probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()


def doge_logits(output: Any) -> Tensor:
    """Doge's experts are the cells of a grid, [2, N, E^(1/2)] logits for rows and columns; a cell's is their sum."""
    rows, columns = output[1]
    return (rows[:, :, None] + columns[:, None, :]).flatten(-2)


DEFAULT_ADAPTERS = (
    # Their masks lack the tokens beyond an expert's capacity: what was chosen for those is in the logits alone.
    RouterAdapter(r"^SwitchTransformersTop1Router$", logits=2, top_k=1),
    RouterAdapter(r"^NllbMoeTop2Router$", logits=2, top_k=2),
    RouterAdapter(r"^Llama4Router$", logits=1, top_k="top_k", score_function="sigmoid"),
    RouterAdapter(r"^JetMoeTopKGating$", logits=4, top_k="top_k"),
    RouterAdapter(r"^DbrxRouter$", logits=None, expert_ids=None),
    RouterAdapter(r"^(Diffusion)?Gemma\d*TextRouter$", logits=log_probabilities),
    ContextRouter(r"^DogeCDMoE$", logits=doge_logits, top_k="top_k"),
    ContextRouter(r"^ZayaRouter$", expert_ids=zaya_ids, scores=zaya_scores, score_function="softmax"),
    TableRouter(r"^DeepseekV4HashRouter$"),
    BiasGivenRows(r"^AfmoeTokenChoiceRouter$"),
    BiasGiven(r"^(Dots3NoteVision|HYV3|Lfm2Moe|MiniMaxM2)TopKRouter$"),
    RouterAdapter(r"^(DeepseekV2|DeepseekOcr2Text|UnlimitedOcrText)TopkRouter$", scores=best_groups_of_one),
    RouterAdapter(r"^(Mistral4|MistralLarge4Text)TopkRouter$", scores=best_groups_of_softmax),
    RouterAdapter(r"^AXK2TopkRouter$", scores=groups_at_zero),
    RouterAdapter(r"^(LongcatFlashTopk|Ernie4_5_\w*TopK)Router$", scores=softmax_plus_bias, score_function="softmax"),
    RouterAdapter(r"^Kolibri1TopKRouter$", scores=logits_plus_bias),
    RouterAdapter(r"^FlintTopKRouter$", score_function="sigmoid"),
    RouterAdapter(r"Top[kK]Router$|^HunYuanMoEV1Gate$", scores=selection_scores),
)
