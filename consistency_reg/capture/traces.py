"""Make the trace of what routers decided in a forward, and one trace of several forwards."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from consistency_reg.capture.finding import Router, how_to_register
from consistency_reg.capture.readings import Forward
from consistency_reg.masks import Shape
from consistency_reg.routing import RoutingTrace


def trace_of(
    routers: Mapping[str, Router],
    forward: Forward,
    shape: Shape,
    valid: Tensor | None,
    document_ids: Tensor | None,
    *,
    with_inputs: bool,
) -> RoutingTrace:
    """Return the routing of a forward of [B, T] tokens, graph kept.

    Args:
        routers: by name; those of the forward at least.
        forward: what each router decided.
        shape: (B, T).
        valid, document_ids: [B, T] or None.
        with_inputs: whether the trace is to hold what each router was given.

    Raises:
        RuntimeError: expert ids or inputs of a router are not known.
        ValueError: masks of another shape.
    """
    B, T = shape
    if unread := [str(routers[name]) for name, reading in forward.items() if reading.expert_ids is None]:
        kind = type(routers[next(iter(forward))].module).__name__
        raise RuntimeError(
            f"the expert ids are not known of {unread}, which return none: the experts beside them were given "
            f"none either.{how_to_register(kind)}"
        )
    found = [(routers[name].adapter, routers[name].module, reading) for name, reading in forward.items()]
    # The scores are not read in a hook: within a checkpointed layer that would change what is saved.
    scores = [adapter.read_scores(module, one.logits, one.ids, one.given) for adapter, module, one in found]
    return RoutingTrace(
        expert_ids=[reading.ids.reshape(B, T, -1) for reading in forward.values()],
        num_experts=[reading.logits.shape[-1] for reading in forward.values()],
        scores=[score.reshape(B, T, -1) for score in scores],
        logits=[reading.logits.reshape(B, T, -1) for reading in forward.values()],
        valid=valid,
        document_ids=document_ids,
        layer_names=tuple(forward),
        score_functions=[adapter.read_score_function(module) for adapter, module, _ in found],
        inputs=_inputs(forward, shape) if with_inputs else None,
    )


@torch.no_grad()
def check_selection(trace: RoutingTrace, routers: Mapping[str, Router]) -> None:
    """Raise ValueError if a router that was read by its shape alone does not select by its logits; reads the data.

    Args:
        trace: of a forward.
        routers: those to check, by name; others of the trace are left alone.
    """
    for layer in trace:
        if layer.name not in routers:
            continue
        assert layer.scores is not None
        best = layer.scores.topk(layer.top_k).indices.sort().values
        if not torch.equal(best[trace.valid_mask], layer.expert_ids.sort().values[trace.valid_mask]):
            router = routers[layer.name]
            raise ValueError(
                f"{router} is of no class that is known, and its choice is not the top of its logits."
                f"{how_to_register(type(router.module).__name__)}"
            )


def _inputs(forward: Forward, shape: Shape) -> list[Tensor]:
    inputs = {name: reading.inputs for name, reading in forward.items()}
    missing = [name for name, value in inputs.items() if value is None]
    if missing:
        raise RuntimeError(
            f"keep_inputs needs routers that take their input as the first positional argument, which {missing} did not"
        )
    return [value.reshape(*shape, -1) for value in inputs.values() if value is not None]


def join(traces: Sequence[RoutingTrace]) -> RoutingTrace:
    """Return the trace of all rows, the shorter ones padded on the right; the layers must be the same.

    Example:
        >>> one, other = (RoutingTrace([torch.zeros(1, T, 1, dtype=torch.int64)], 2) for T in (2, 3))
        >>> joined = join([one, other])
        >>> joined.shape, joined.valid.tolist()
        ((2, 3), [[True, True, False], [True, True, True]])
    """
    first = traces[0]
    if len(traces) == 1:
        return first
    T = max(trace.shape[1] for trace in traces)
    told = any(trace.valid is not None or trace.shape[1] != T for trace in traces)
    with_documents = any(trace.document_ids is not None for trace in traces)
    return RoutingTrace(
        expert_ids=_rows([trace.expert_ids for trace in traces], T),
        num_experts=first.num_experts,
        scores=None if first.scores is None else _rows([trace.scores or () for trace in traces], T),
        logits=None if first.logits is None else _rows([trace.logits or () for trace in traces], T),
        valid=torch.cat([_padded(trace.valid_mask, T) for trace in traces]) if told else None,
        document_ids=torch.cat([_padded(_documents(trace), T) for trace in traces]) if with_documents else None,
        layer_names=first.layer_names,
        score_functions=first.score_functions,
        inputs=None if first.inputs is None else _rows([trace.inputs or () for trace in traces], T),
    )


def _rows(layers: Sequence[Sequence[Tensor]], T: int) -> list[Tensor]:
    return [torch.cat([_padded(one, T) for one in of_layer]) for of_layer in zip(*layers, strict=True)]


def _documents(trace: RoutingTrace) -> Tensor:
    if trace.document_ids is not None:
        return trace.document_ids
    return torch.zeros(trace.shape, dtype=torch.int64, device=trace.expert_ids[0].device)


def _padded(tensor: Tensor, T: int) -> Tensor:
    """Return [B, T, ...] of [B, t, ...], 0 behind."""
    missing = T - tensor.shape[1]
    return nn.functional.pad(tensor, (*(0,) * (2 * (tensor.dim() - 2)), 0, missing)) if missing else tensor
