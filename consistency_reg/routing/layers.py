"""The routing of one MoE layer, and of several layers of one shape that are worked on at once."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from consistency_reg.routing.checks import check_id_shape
from consistency_reg.routing.weights import LOG_WEIGHTS, SCORE_FUNCTIONS, exact, probabilities


@dataclass(frozen=True)
class LayerRouting:
    """Holds the routing of one MoE layer: B rows, T tokens, K active of E routed experts.

    Attributes:
        name: where the router stands in the model.
        expert_ids: [B, T, K] int64, the router's own choice, in its order.
        num_experts: E.
        scores: [B, T, E] what the router selects by, graph kept; None where only ids are known.
        logits: [B, T, E] the router's raw output, graph kept; None where only ids are known.
        score_function: how logits become weights, "softmax", "sigmoid" or "sqrtsoftplus" (the square root of softplus).
        inputs: [B, T, H] the router's input, no graph; None where it was not captured.
    """

    name: str
    expert_ids: Tensor
    num_experts: int
    scores: Tensor | None = None
    logits: Tensor | None = None
    score_function: str = "softmax"
    inputs: Tensor | None = None

    @property
    def top_k(self) -> int:
        """Return K, the experts that are active per token."""
        return self.expert_ids.shape[-1]

    @property
    def probabilities(self) -> Tensor:
        """Return [B, T, E] the router's distribution over experts, in fp32 or better (all weights normalized)."""
        return probabilities(self._known_logits, self.score_function)

    @property
    def log_probabilities(self) -> Tensor:
        """Return [B, T, E] the logarithm of :attr:`probabilities`, finite also where those underflow."""
        return LOG_WEIGHTS[self.score_function](exact(self._known_logits)).log_softmax(dim=-1)

    @property
    def _known_logits(self) -> Tensor:
        if self.logits is None:
            raise ValueError(
                f"layer {self.name!r}: this needs the router's logits, but the trace holds expert ids only"
            )
        return self.logits


@dataclass(frozen=True)
class LayerStack:
    """Holds S layers of one shape, worked on at once: B rows, T tokens, K active of E routed experts in each.

    Attributes:
        expert_ids: [S, B, T, K] int64, the routers' own choices, in their order.
        num_experts: E.
        source: [S, B, T, E], the scores or the logits of the routers, whichever is to be worked on; graph kept.
        score_function: how logits become weights, see :class:`LayerRouting`.
    """

    expert_ids: Tensor
    num_experts: int
    source: Tensor
    score_function: str = "softmax"

    @classmethod
    def of(cls, layers: Sequence[LayerRouting], sources: Sequence[Tensor]) -> "LayerStack":
        """Stack layers that agree in shape and score function with a source [B, T, E] for each; one copies nothing.

        Example:
            >>> from consistency_reg import RoutingTrace
            >>> layer = RoutingTrace([torch.tensor([[[0], [1]]])], num_experts=3).layers[0]
            >>> LayerStack.of([layer, layer], [torch.zeros(1, 2, 3)] * 2).expert_ids.shape
            torch.Size([2, 1, 2, 1])
        """
        ids, source = (
            torch.stack(tuple(tensors)) if len(tensors) > 1 else tensors[0][None]
            for tensors in ([layer.expert_ids for layer in layers], sources)
        )
        return cls(ids, layers[0].num_experts, source, layers[0].score_function)

    @property
    def top_k(self) -> int:
        """Return K, the experts that are active per token."""
        return self.expert_ids.shape[-1]


def check_layer(layer: LayerRouting, shape: tuple[int, int]) -> None:
    """Raise if a layer's tensors do not match each other or the (B, T) of the trace. Reads no values."""
    check_id_shape(layer.expert_ids, layer.num_experts, f"expert_ids of layer {layer.name!r}")
    if layer.expert_ids.shape[:2] != shape:
        raise ValueError(
            f"expert_ids of layer {layer.name!r} must have [B, T] = {list(shape)} as the first layer has, "
            f"got {list(layer.expert_ids.shape[:2])}"
        )
    for field in ("logits", "scores"):  # the logits first: they stand for the scores where none were given
        values = getattr(layer, field)
        if values is None:
            continue
        if not values.is_floating_point():
            raise TypeError(f"{field} of layer {layer.name!r} must be floating point, got {values.dtype}")
        if values.shape != (*shape, layer.num_experts):
            raise ValueError(
                f"{field} of layer {layer.name!r} must have shape [B, T, E] = {[*shape, layer.num_experts]}, "
                f"got {list(values.shape)}"
            )
    if layer.inputs is not None and (layer.inputs.dim() != 3 or layer.inputs.shape[:2] != shape):
        raise ValueError(
            f"inputs of layer {layer.name!r} must have shape [B, T, H] with [B, T] = {list(shape)}, "
            f"got {list(layer.inputs.shape)}"
        )
    if layer.score_function not in SCORE_FUNCTIONS:
        raise ValueError(
            f"score_functions of layer {layer.name!r} must be one of {SCORE_FUNCTIONS}, got {layer.score_function!r}"
        )
