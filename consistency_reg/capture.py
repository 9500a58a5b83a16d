"""Find the routers of a model, listen to them during a forward pass, and hand over what they decided.

All knowledge of model internals lives here: which module is a router, what it returns, what it selects by.
"""

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from consistency_reg.hooks import OwnedHook
from consistency_reg.routing import RoutingTrace


def selection_scores(router: nn.Module, logits: Tensor) -> Tensor:
    """What a top-k router selects by, [..., E] with the graph of the logits.

    A softmax keeps the order of the logits, so these are the scores. With a correction bias (DeepSeek-V3) selection
    is by ``sigmoid(logits) + bias``, and experts outside the best groups are ruled out (minus infinity).
    """
    bias = getattr(router, "e_score_correction_bias", None)
    if bias is None:
        return logits
    scores = logits.sigmoid() + bias
    groups, kept = getattr(router, "num_group", 1), getattr(router, "topk_group", 1)
    if kept >= groups:
        return scores
    grouped = scores.unflatten(-1, (groups, -1))
    best = grouped.topk(2, dim=-1).values.sum(dim=-1).topk(kept, dim=-1).indices
    ruled_out = scores.new_ones(grouped.shape[:-1]).scatter(-1, best, 0).bool()
    return grouped.masked_fill(ruled_out[..., None], -float("inf")).flatten(-2)


@dataclass(frozen=True)
class RouterAdapter:
    """How to read one kind of router from its forward output.

    Args:
        pattern: regular expression that the router's class name must match (``re.search``).
        logits: position of the [..., E] router logits in the output.
        expert_ids: position of the [..., K] chosen expert ids in the output.
        top_k: K of a router that returns no ids: the experts of its K highest logits are the chosen ones.
        scores: ``(router, logits) -> [..., E]``, what the router selects by.
    """

    pattern: str
    logits: int = 0
    expert_ids: int = 2
    top_k: int | None = None
    scores: Callable[[nn.Module, Tensor], Tensor] = selection_scores

    def matches(self, module: nn.Module) -> bool:
        """Whether ``module`` is of this kind."""
        return re.search(self.pattern, type(module).__name__) is not None


# transformers >= 5: (router_logits, routing_weights, expert_ids). Switch Transformers return a mask instead of ids that
# lacks the tokens beyond an expert's capacity: what the router chose for those is in its logits alone.
DEFAULT_ADAPTERS = (
    RouterAdapter(r"Top[kK]Router$"),
    RouterAdapter(r"^SwitchTransformersTop1Router$", logits=2, top_k=1),
)


@dataclass(frozen=True)
class _Reading:
    logits: Tensor
    expert_ids: Tensor
    score_function: str
    inputs: Tensor | None
    lost_graph: bool


class FrozenRouter(nn.Module):
    """A copy of a router that never learns: [N, H] router inputs -> [N, E] logits, no gradient."""

    def __init__(self, router: nn.Module, adapter: RouterAdapter) -> None:
        super().__init__()
        self.router = deepcopy(router).requires_grad_(False).eval()
        self._position = adapter.logits

    @torch.no_grad()
    def forward(self, inputs: Tensor) -> Tensor:
        """The logits of the router as it was."""
        return self.router(inputs)[self._position]

    def train(self, mode: bool = True) -> "FrozenRouter":
        """Without effect: the copy stays in evaluation mode."""
        return self


class RouterCapture:
    """Listens to every router of a model; a context manager, or :meth:`attach` and :meth:`detach`.

    Each forward of the model replaces what the one before it left. Only a forward is recorded: when activation
    checkpointing runs layers again in the backward pass, that is not counted again. A copy or a pickle of the model
    does not carry the capture with it. Under ``torch.compile`` attach before the first compiled forward.

    Args:
        model: any module that contains routers.
        adapters: kinds of routers to look for, before the built-in ones.
        keep_inputs: also keep what each router was given (its first positional argument, no graph), which an anchor
            to earlier routers needs.

    Raises:
        ValueError: the model has no router that an adapter knows; the message says what was found.

    Example:
        >>> from types import SimpleNamespace
        >>> class ToyTopKRouter(nn.Linear):
        ...     def forward(self, x):
        ...         logits = super().forward(x)
        ...         weights, ids = logits.softmax(-1).topk(2)
        ...         return logits, weights, ids
        >>> import torch
        >>> model = nn.Sequential(ToyTopKRouter(8, 4))
        >>> with RouterCapture(model) as capture:
        ...     _ = model(torch.randn(3, 5, 8))
        >>> capture.trace().layers[0].expert_ids.shape
        torch.Size([3, 5, 2])
    """

    def __init__(self, model: nn.Module, adapters: Sequence[RouterAdapter] = (), *, keep_inputs: bool = False) -> None:
        self.model = model
        self.keep_inputs = keep_inputs
        self._routers = _find_routers(model, (*adapters, *DEFAULT_ADAPTERS))
        self._handles: list[RemovableHandle] = []
        self._readings: dict[str, list[_Reading]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._recordings = 0  # open blocks of recording()
        self._in_forward = False
        self._grad_mode = False  # of the forward as a whole

    @property
    def layer_names(self) -> tuple[str, ...]:
        """The routers' names in the model, in its order."""
        return tuple(self._routers)

    @property
    def routers(self) -> dict[str, nn.Module]:
        """The router modules by name."""
        return {name: router for name, (router, _) in self._routers.items()}

    def frozen_routers(self) -> dict[str, FrozenRouter]:
        """Copies of the routers as they are now, by name, for :class:`~consistency_reg.losses.RouterAnchorLoss`."""
        return {name: FrozenRouter(router, adapter) for name, (router, adapter) in self._routers.items()}

    def attach(self) -> "RouterCapture":
        """Start to listen; without effect when attached already."""
        if self._handles:
            return self
        self._in_forward = False
        self._handles.append(self.model.register_forward_pre_hook(OwnedHook(self, "_begin_forward")))
        self._handles.append(self.model.register_forward_hook(OwnedHook(self, "_end_forward"), always_call=True))
        for name, (router, _) in self._routers.items():
            block = self.model.get_submodule(_block_name(name))
            self._handles.append(block.register_forward_pre_hook(OwnedHook(self, "_see_block", name)))
            self._handles.append(router.register_forward_hook(OwnedHook(self, "_read", name)))
        return self

    def detach(self) -> None:
        """Stop to listen and forget; without effect when not attached."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._readings.clear()

    def __enter__(self) -> "RouterCapture":
        return self.attach()

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()  # what was read stays for trace()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record all that runs inside as one forward, for callers that do not call ``model`` itself."""
        if not self._recordings:
            self._begin()
        self._recordings += 1
        try:
            yield
        finally:
            self._recordings -= 1

    def trace(self, valid: Tensor | None = None, document_ids: Tensor | None = None) -> RoutingTrace:
        """The routing of the last forward, graph kept where there was one.

        Args:
            valid: [B, T] bool, True for real tokens; all when None.
            document_ids: [B, T] integers; one document a row when None.

        Raises:
            RuntimeError: there was no forward, or a router ran not exactly once in it.
            ValueError: ``valid`` or ``document_ids`` of another shape than the batch.

        Warns:
            UserWarning: routers ran without autograd in a forward with it, as reentrant checkpointing does: a loss on
                this trace has no gradient there.
        """
        counts = {name: len(self._readings.get(name, ())) for name in self._routers}
        if any(count != 1 for count in counts.values()):
            raise RuntimeError(_explain(counts, attached=bool(self._handles)))
        B, T = self._batch_shape(valid)
        readings = {name: self._readings[name][0] for name in self._routers}
        if lost := [name for name, reading in readings.items() if reading.lost_graph]:
            warnings.warn(
                f"a loss on this trace has no gradient for {len(lost)} of {len(readings)} routers: they ran without "
                "autograd in a forward with it. Reentrant activation checkpointing does this; "
                "use_reentrant=False does not",
                stacklevel=2,
            )
        return RoutingTrace(
            expert_ids=[reading.expert_ids.reshape(B, T, -1) for reading in readings.values()],
            num_experts=[reading.logits.shape[-1] for reading in readings.values()],
            scores=[self._scores(name).reshape(B, T, -1) for name in readings],
            logits=[reading.logits.reshape(B, T, -1) for reading in readings.values()],
            valid=valid,
            document_ids=document_ids,
            layer_names=tuple(readings),
            score_functions=[reading.score_function for reading in readings.values()],
            inputs=self._inputs(readings, (B, T)) if self.keep_inputs else None,
        )

    def clear(self) -> None:
        """Forget the last forward, which frees its tensors."""
        self._readings.clear()

    def _batch_shape(self, valid: Tensor | None) -> tuple[int, int]:
        shape = next(iter(self._shapes.values()), ())
        if len(shape) >= 3:
            B, T = shape[:2]
        elif valid is not None and valid.dim() == 2:
            B, T = valid.shape
        else:
            raise RuntimeError(
                "the rows of the batch cannot be told from the routers' flat input: give `valid` to trace()"
            )
        first = self._readings[self.layer_names[0]][0].expert_ids
        tokens = first.numel() // first.shape[-1]
        if tokens != B * T:
            raise ValueError(f"valid must cover the tokens of the forward, got {B} x {T} for {tokens} routed tokens")
        return B, T

    def _scores(self, name: str) -> Tensor:
        """What the router selected by. Not for the hook: within a checkpointed layer it would change what is saved."""
        router, adapter = self._routers[name]
        return adapter.scores(router, self._readings[name][0].logits)

    def _inputs(self, readings: dict[str, _Reading], shape: tuple[int, int]) -> list[Tensor]:
        inputs = {name: reading.inputs for name, reading in readings.items()}
        missing = [name for name, value in inputs.items() if value is None]
        if missing:
            raise RuntimeError(
                f"keep_inputs needs routers that take their input as the first positional argument, "
                f"which {missing} did not"
            )
        return [value.reshape(*shape, -1) for value in inputs.values() if value is not None]

    def _begin(self) -> None:
        self._readings.clear()
        self._shapes.clear()
        self._grad_mode = torch.is_grad_enabled()

    def _begin_forward(self, *_: Any) -> None:
        if not self._recordings:
            self._begin()
        self._in_forward = True

    def _end_forward(self, *_: Any) -> None:
        self._in_forward = False

    @property
    def _listening(self) -> bool:
        return self._in_forward or self._recordings > 0

    def _see_block(self, name: str, block: nn.Module, inputs: tuple[Any, ...]) -> None:
        if self._listening and inputs and isinstance(inputs[0], Tensor):
            self._shapes[name] = tuple(inputs[0].shape)

    def _read(self, name: str, router: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if not self._listening:
            return
        if inputs and isinstance(inputs[0], Tensor) and inputs[0].dim() == 3:
            self._shapes[name] = tuple(inputs[0].shape)
        _, adapter = self._routers[name]
        try:
            logits = output[adapter.logits]
            expert_ids = output[adapter.expert_ids] if adapter.top_k is None else logits.topk(adapter.top_k).indices
            if logits.shape[:-1] != expert_ids.shape[:-1] or expert_ids.is_floating_point():
                raise TypeError
        except (TypeError, LookupError, AttributeError):
            raise TypeError(
                f"router {name!r} ({type(router).__name__}) must return logits [..., E] at position {adapter.logits} "
                f"and integer expert ids [..., K] at position {adapter.expert_ids}, got {_describe(output)}: "
                "pass a RouterAdapter that fits"
            ) from None
        sigmoid = getattr(router, "e_score_correction_bias", None) is not None
        given = inputs[0].detach() if self.keep_inputs and inputs and isinstance(inputs[0], Tensor) else None
        reading = _Reading(
            logits,
            expert_ids.long(),
            "sigmoid" if sigmoid else "softmax",
            given,
            lost_graph=self._grad_mode and not torch.is_grad_enabled(),
        )
        self._readings.setdefault(name, []).append(reading)


def _block_name(router: str) -> str:
    """The module around a router, past what PEFT's target_parameters wrap it in."""
    return re.sub(r"(\.base_layer)+$", "", router).rpartition(".")[0]


def _find_routers(model: nn.Module, adapters: Sequence[RouterAdapter]) -> dict[str, tuple[nn.Module, RouterAdapter]]:
    routers: dict[str, tuple[nn.Module, RouterAdapter]] = {}
    last = ""
    for name, module in model.named_modules():
        if last and name.startswith(f"{last}."):
            continue  # a part of a router
        # PEFT's modules_to_save holds a router and its trained copies: it calls one of them, so it is the router
        router = getattr(module, "original_module", module)
        adapter = next((adapter for adapter in adapters if adapter.matches(router)), None)
        if adapter is not None:
            routers[name] = (module, adapter)
            last = name
    if not routers:
        alike = sorted(
            {type(m).__name__ for m in model.modules() if re.search(r"rout|gate|expert|moe", type(m).__name__, re.I)}
        )
        raise ValueError(
            f"model must contain mixture-of-experts routers, got {type(model).__name__} without one that an adapter "
            f"knows (class names that match {[adapter.pattern for adapter in adapters]}). "
            + (
                f"Modules that look like a part of one: {alike}; name the router in a RouterAdapter."
                if alike
                else "It looks dense."
            )
        )
    return routers


def _explain(counts: dict[str, int], *, attached: bool) -> str:
    found = f"{sum(count > 0 for count in counts.values())} of {len(counts)} routers were captured"
    if not any(counts.values()):
        reason = "run a forward of the model first" if attached else "attach the capture before the forward"
        return (
            f"{found}: {reason} (a fused or replaced MoE block that does not call its router cannot be captured, "
            "nor a model that torch.compile has compiled before the capture was attached)"
        )
    missing = [name for name, count in counts.items() if count == 0]
    if missing:
        return f"{found}: {missing} did not run, so a fused or replaced MoE block may bypass them"
    repeated = {name: count for name, count in counts.items() if count > 1}
    return f"{found}, some more than once in one forward ({repeated}): take a trace after each forward of the model"


def _describe(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"one tensor of shape {list(output.shape)}"
    if isinstance(output, (tuple, list)):
        return (
            "("
            + ", ".join(f"{list(o.shape)} {o.dtype}" if isinstance(o, Tensor) else type(o).__name__ for o in output)
            + ")"
        )
    return type(output).__name__
