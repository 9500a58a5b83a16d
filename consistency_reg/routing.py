"""The routing of one forward pass: of a layer, of layers of one shape, of a model; and the checks of such input."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from consistency_reg.documents import document_positions, row_chunks

LOWEST = -80.0  # softplus(x) is e^x there, still a normal number in fp32

# How routers turn logits [..., E] into weights, before they are normalized, and the logarithms of these.
WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": partial(torch.softmax, dim=-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda logits: nn.functional.softplus(logits).sqrt(),
}
LOG_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits,  # up to a constant of each token
    "sigmoid": nn.functional.logsigmoid,
    "sqrtsoftplus": lambda logits: nn.functional.softplus(logits.clamp_min(LOWEST)).log() / 2,
}
SCORE_FUNCTIONS = tuple(WEIGHTS)
CHECKED_TOKENS = 2**16  # at a time: bounds the memory of a check


@dataclass(frozen=True)
class LayerRouting:
    """The routing of one MoE layer: B rows, T tokens, K active of E routed experts.

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
        """K, the experts that are active per token."""
        return self.expert_ids.shape[-1]

    @property
    def probabilities(self) -> Tensor:
        """[B, T, E] the router's distribution over experts, in fp32 or better (all weights normalized)."""
        return probabilities(self._known_logits, self.score_function)

    @property
    def log_probabilities(self) -> Tensor:
        """[B, T, E] the logarithm of :attr:`probabilities`, finite also where those underflow."""
        return LOG_WEIGHTS[self.score_function](_exact(self._known_logits)).log_softmax(dim=-1)

    @property
    def _known_logits(self) -> Tensor:
        if self.logits is None:
            raise ValueError(
                f"layer {self.name!r}: this needs the router's logits, but the trace holds expert ids only"
            )
        return self.logits


@dataclass(frozen=True)
class LayerStack:
    """S layers of one shape, worked on at once: B rows, T tokens, K active of E routed experts in each.

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
        """K, the experts that are active per token."""
        return self.expert_ids.shape[-1]


def probabilities(logits: Tensor, score_function: str = "softmax") -> Tensor:
    """Return a router's distribution over experts from its logits [..., E], in fp32 or better: all weights normalized.

    Example:
        >>> probabilities(torch.tensor([0.0, 0.0]), "sigmoid")
        tensor([0.5000, 0.5000])
    """
    weights = WEIGHTS[score_function](_exact(logits))
    if score_function == "softmax":
        return weights
    return weights / weights.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)


def _exact(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


@dataclass(frozen=True)
class RoutingTrace:
    """The routing of every MoE layer on one batch. Layers may differ in E and K.

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
            _check_layer(layer, self.shape)
        check_masks(self.shape, self.valid, self.document_ids)

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T)."""
        B, T = self.expert_ids[0].shape[:2]
        return B, T

    @property
    def layers(self) -> tuple[LayerRouting, ...]:
        """The layers, in the model's order."""
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
        """[B, T] int64: index of every token within its document, -1 on padding."""
        return document_positions(self.shape, self.valid, self.document_ids, device=self.expert_ids[0].device)

    @property
    def valid_mask(self) -> Tensor:
        """[B, T] bool, True for real tokens."""
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


def check_masks(shape: tuple[int, int], valid: Tensor | None, document_ids: Tensor | None) -> None:
    """Raise if ``valid`` is not bool [B, T] or ``document_ids`` is not integer [B, T]."""
    if valid is not None:
        if valid.dtype != torch.bool:
            raise TypeError(f"valid must be a bool tensor, True for real tokens, got {valid.dtype}")
        if valid.shape != shape:
            raise ValueError(f"valid must have shape [B, T] = {list(shape)}, got {list(valid.shape)}")
    if document_ids is not None:
        if document_ids.is_floating_point() or document_ids.dtype == torch.bool:
            raise TypeError(f"document_ids must be an integer tensor, got {document_ids.dtype}")
        if document_ids.shape != shape:
            raise ValueError(f"document_ids must have shape [B, T] = {list(shape)}, got {list(document_ids.shape)}")


def check_id_shape(expert_ids: Tensor, num_experts: int, name: str = "expert_ids") -> None:
    """Raise if ``expert_ids`` is not int64 [B, T, K] with 1 <= K <= E. Reads no values: no wait for a GPU."""
    if expert_ids.dtype != torch.int64:
        raise TypeError(f"{name} must be an int64 tensor, got {expert_ids.dtype}")
    if expert_ids.dim() != 3:
        raise ValueError(f"{name} must have shape [B, T, K], got {list(expert_ids.shape)}")
    if not 1 <= expert_ids.shape[-1] <= num_experts:
        raise ValueError(
            f"{name} must have between 1 and num_experts={num_experts} experts per token, got K={expert_ids.shape[-1]}"
        )


def check_expert_ids(
    expert_ids: Tensor, num_experts: int, valid: Tensor | None = None, *, name: str = "expert_ids"
) -> None:
    """Raise if the ids of a valid token are out of range or repeated. Reads the data."""
    check_id_shape(expert_ids, num_experts, name)
    before = 0
    for rows in row_chunks(len(expert_ids), expert_ids.shape[1], CHECKED_TOKENS):
        ids_NK = expert_ids[rows].flatten(0, 1) if valid is None else expert_ids[rows][valid[rows]]
        if ids_NK.numel():
            _check_tokens(ids_NK, num_experts, name, before)
        before += len(ids_NK)


def _check_tokens(ids_NK: Tensor, num_experts: int, name: str, before: int) -> None:
    low, high = (int(bound) for bound in ids_NK.aminmax())
    if low < 0 or high >= num_experts:
        raise ValueError(
            f"{name} must lie in 0..{num_experts - 1} (num_experts={num_experts}), got ids from {low} to {high}"
        )
    repeated_N = _repeats_an_expert(ids_NK)
    if bool(repeated_N.any()):
        first = int(repeated_N.nonzero()[0])
        found = f"{ids_NK[first].tolist()} (valid token {before + first})"
        raise ValueError(f"{name} must not repeat an expert within a token, got {found}")


def _repeats_an_expert(ids_NK: Tensor) -> Tensor:
    """Return whether a token names an expert twice: [N, K] -> [N] bool. Comparing pairs is faster than sorting."""
    if ids_NK.shape[1] > 16:
        ordered_NK = ids_NK.sort(dim=-1).values
        return (ordered_NK[:, 1:] == ordered_NK[:, :-1]).any(dim=-1)
    columns = ids_NK.T.to(torch.int32, memory_format=torch.contiguous_format).unbind(0)
    repeated_N = torch.zeros_like(columns[0], dtype=torch.bool)
    for i, one in enumerate(columns):
        for other in columns[:i]:
            repeated_N |= one == other
    return repeated_N


def _check_layer(layer: LayerRouting, shape: tuple[int, int]) -> None:
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
