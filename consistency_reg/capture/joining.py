"""Traces of several forwards as one: their rows below one another."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from consistency_reg.routing import RoutingTrace


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
