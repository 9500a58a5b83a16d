"""The routing of every MoE layer of a model in one forward pass."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from consistency_reg.routing.checks import check_expert_ids, check_masks
from consistency_reg.routing.documents import document_positions
from consistency_reg.routing.layers import LayerRouting, check_layer


@dataclass(frozen=True)
class RoutingTrace:
    """Holds the routing of every MoE layer on one batch. Layers may differ in E and K.

    Args:
        expert_ids: a [B, T, K] integer tensor for each layer.
        num_experts: E, one number for all layers or one for each.
        scores: a [B, T, E] tensor for each layer, what the router selects by; the logits when None.
        logits: a [B, T, E] tensor for each layer, the router's raw output; optional.
        valid: [B, T] bool, True for real tokens; all when None.
        document_ids: [B, T] integers; one document a row when None.
        layer_names: one for each layer; "layer_00", ... when None.
        score_functions: "softmax", "sigmoid" or "sqrtsoftplus" for each layer; softmax when None.
        inputs: a [B, T, H] tensor for each layer, what the router was given; optional.

    Raises:
        TypeError: ids, masks or scores of a wrong dtype.
        ValueError: shapes that do not match, K > E. Values are checked by :meth:`check_values`, which reads the data.

    Example:
        >>> trace = RoutingTrace([torch.tensor([[[0, 1], [1, 2]]])], num_experts=4)
        >>> len(trace), trace.shape, trace.layers[0].top_k
        (1, (1, 2), 2)
    """

    expert_ids: Sequence[Tensor]
    num_experts: Sequence[int] | int
    scores: Sequence[Tensor] | None = None
    logits: Sequence[Tensor] | None = None
    valid: Tensor | None = None
    document_ids: Tensor | None = None
    layer_names: Sequence[str] | None = None
    score_functions: Sequence[str] | None = None
    inputs: Sequence[Tensor] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.expert_ids, Tensor):
            raise TypeError(
                "expert_ids must be a sequence, a [B, T, K] tensor for each layer, got one tensor: write [expert_ids]"
            )
        L = len(self.expert_ids)
        if L == 0:
            raise ValueError("expert_ids must hold at least one layer, got none")
        if isinstance(self.num_experts, int):
            object.__setattr__(self, "num_experts", (self.num_experts,) * L)
        if self.scores is None:
            object.__setattr__(self, "scores", self.logits)
        if self.layer_names is None:
            object.__setattr__(self, "layer_names", tuple(f"layer_{i:02d}" for i in range(L)))
        if self.score_functions is None:
            object.__setattr__(self, "score_functions", ("softmax",) * L)
        for field in ("expert_ids", "num_experts", "scores", "logits", "layer_names", "score_functions", "inputs"):
            values = getattr(self, field)
            if values is None:
                continue
            if len(values) != L:
                raise ValueError(
                    f"{field} must have one entry for each of the {L} layers of expert_ids, got {len(values)}"
                )
            object.__setattr__(self, field, tuple(values))
        for layer in self.layers:
            check_layer(layer, self.shape)
        check_masks(self.shape, self.valid, self.document_ids)

    @property
    def shape(self) -> tuple[int, int]:
        """Return the rows and the tokens of a row, (B, T)."""
        B, T = self.expert_ids[0].shape[:2]
        return B, T

    @property
    def layers(self) -> tuple[LayerRouting, ...]:
        """Return the layers, in the model's order."""
        assert self.layer_names is not None
        assert self.score_functions is not None
        assert not isinstance(self.num_experts, int)
        none = (None,) * len(self.expert_ids)
        columns = zip(
            self.layer_names,
            self.expert_ids,
            self.num_experts,
            self.scores or none,
            self.logits or none,
            self.score_functions,
            self.inputs or none,
            strict=True,
        )
        return tuple(LayerRouting(*column) for column in columns)

    def __len__(self) -> int:
        return len(self.expert_ids)

    def __iter__(self) -> Iterator[LayerRouting]:
        return iter(self.layers)

    @cached_property
    def positions(self) -> Tensor:
        """Return [B, T] int64, the index of every token within its document, -1 on padding."""
        return document_positions(self.shape, self.valid, self.document_ids, device=self.expert_ids[0].device)

    @property
    def valid_mask(self) -> Tensor:
        """Return [B, T] bool, True for real tokens."""
        if self.valid is not None:
            return self.valid
        return torch.ones(self.shape, dtype=torch.bool, device=self.expert_ids[0].device)

    def detach(self) -> "RoutingTrace":
        """Return the same trace without its autograd graph."""
        detached = replace(
            self,
            scores=None if self.scores is None else [scores.detach() for scores in self.scores],
            logits=None if self.logits is None else [logits.detach() for logits in self.logits],
            inputs=None if self.inputs is None else [inputs.detach() for inputs in self.inputs],
        )
        if "positions" in vars(self):
            vars(detached)["positions"] = self.positions
        return detached

    def check_values(self) -> None:
        """Read the data and raise ValueError on ids out of range or repeated within a token, or NaN scores."""
        for layer in self.layers:
            check_expert_ids(
                layer.expert_ids, layer.num_experts, self.valid, name=f"expert_ids of layer {layer.name!r}"
            )
            if layer.scores is not None and bool(layer.scores[self.valid_mask].isnan().any()):
                raise ValueError(f"scores of layer {layer.name!r} must be numbers, got NaN")
