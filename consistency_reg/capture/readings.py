"""Hold what a router decided in one call, and what the calls of one forward have in common."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from consistency_reg.capture.calls import Call
from consistency_reg.masks import Shape


@dataclass(eq=False)
class Reading:
    """Holds the decision of a router in one call.

    Attributes:
        logits: its logits, with their graph.
        expert_ids: its choice; None until the experts are given it.
        given: what it was given after the hidden states.
        inputs: the hidden states, if they are kept.
        shape: of what its block was given, [B, T, H] or flat.
        grad: whether it ran with autograd.
        began_with_grad: whether the recording began with autograd.
        call: the innermost noted call around it, once that has ended.
    """

    logits: Tensor
    expert_ids: Tensor | None
    given: tuple[Any, ...]
    inputs: Tensor | None
    shape: tuple[int, ...]
    grad: bool
    began_with_grad: bool
    call: Call | None = None

    @property
    def ids(self) -> Tensor:
        """Return the expert ids that the router chose."""
        assert self.expert_ids is not None
        return self.expert_ids

    @property
    def tokens(self) -> int:
        """Return the number of tokens that were routed."""
        return self.logits.numel() // self.logits.shape[-1]

    @property
    def lost_graph(self) -> bool:
        """Tell whether the router ran without autograd in a call with it, as reentrant checkpointing makes it do."""
        return not self.grad and (self.began_with_grad if self.call is None else self.call.grad)


Forward = dict[str, Reading]  # a reading of every router, by name


def by_forward(
    readings: Mapping[str, Sequence[Reading]], most: int | None = None, *, attached: bool = True
) -> list[Forward]:
    """Return the readings of routers by forward, where a model was called several times in a recording.

    Args:
        readings: of each router, in their order.
        most: how many forwards there may be.
        attached: whether a capture listens, for the message where nothing was heard.

    Raises:
        RuntimeError: a router did not run, or not once in each forward.
    """
    counts = {name: len(of_router) for name, of_router in readings.items()}
    number = max(counts.values())
    calls = [[reading.call for reading in of_router] for of_router in readings.values()]
    apart = number <= 1 or all(None not in one and len(set(one)) == len(one) for one in calls)
    if not number or any(count != number for count in counts.values()) or not apart or number > (most or number):
        raise RuntimeError(_explain(counts, attached=attached))
    return [{name: of_router[index] for name, of_router in readings.items()} for index in range(number)]


def _explain(counts: dict[str, int], *, attached: bool) -> str:
    found = f"{sum(count > 0 for count in counts.values())} of {len(counts)} routers were captured"
    if not any(counts.values()):
        reason = "run a forward of the model first" if attached else "attach the capture before the forward"
        return (
            f"{found}: {reason} (a fused or replaced MoE block that does not call its router cannot be captured, "
            "nor a model that torch.compile has compiled before the capture was attached, nor one whose routers PEFT "
            "has wrapped since; the steps of generate are "
            "recorded with generation=True alone)"
        )
    missing = [name for name, count in counts.items() if count == 0]
    if missing:
        return (
            f"{found}: {missing} did not run, so a fused or replaced MoE block may bypass them. Where they need not "
            "run, as in a vision tower without pictures, leave them out with RouterCapture(model, layers=...)"
        )
    repeated = {name: count for name, count in counts.items() if count > 1}
    return f"{found}, some more than once in one forward ({repeated}): take a trace after each forward of the model"


def learns(forward: Forward) -> bool:
    """Return whether a router of a forward ran with gradient, or would have without reentrant checkpointing."""
    return any(reading.logits.requires_grad or reading.lost_graph for reading in forward.values())


def shape_of(forward: Forward, otherwise: Shape | None = None) -> Shape:
    """Return (B, T) of the tokens that all routers of a forward saw; ``otherwise`` where they do not tell.

    Raises:
        ValueError: they saw batches of different shapes, or not as many tokens.
        RuntimeError: nothing tells the rows of flat batches.
    """
    shapes = {name: reading.shape[:2] for name, reading in forward.items() if len(reading.shape) >= 3}
    if len(set(shapes.values())) > 1:
        found = {shape: [name for name in shapes if shapes[name] == shape] for shape in shapes.values()}
        raise ValueError(
            f"the routers ran on batches of different shapes, {found}: a trace has one [B, T], so choose one stack of "
            "layers with layers=, a regular expression on the routers' names"
        )
    calls = (reading.call for reading in forward.values())
    told = next((call.shape for call in calls if call is not None and not call.has_inner and call.shape), None)
    if shapes:
        B, T = next(iter(shapes.values()))
    elif told is not None:
        B, T = told
    elif otherwise is not None:
        B, T = otherwise
    else:
        raise RuntimeError(
            "the rows of the batch cannot be told from the routers' flat input: give `valid` to trace(), or masks="
        )
    for name, reading in forward.items():
        if reading.tokens != B * T:
            raise ValueError(
                f"valid must cover the tokens of the forward, got {B} x {T} for {reading.tokens} routed tokens of "
                f"{name!r}"
            )
    return B, T


def warn_of_lost_graphs(forward: Mapping[str, Reading], stacklevel: int) -> None:
    """Warn where a loss has no gradient as activation checkpointing is reentrant."""
    if lost := [name for name, reading in forward.items() if reading.lost_graph]:
        warnings.warn(
            f"a loss on this trace has no gradient for {len(lost)} of {len(forward)} routers: they ran without "
            "autograd in a forward with it. Reentrant activation checkpointing does this; "
            "use_reentrant=False does not",
            stacklevel=stacklevel,
        )
