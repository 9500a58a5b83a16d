"""Hit rates of cache policies on recorded routing, for every cache size at once: LRU, LFU, Belady and the fixed set.

A cache of experts that starts empty with each document. Counting, the same for every policy (and for SCH, see
:mod:`~consistency_reg.functional.sch`):

1. hits of a token are counted for its K experts against the cache as it was before the token; an expert that was never
   used before hits when the cache has a free slot left, and each such first use of a token takes a slot of its own;
2. then each of the K experts in turn becomes resident, and if the cache is full the resident with the lowest priority
   other than itself is evicted.

N rows, T tokens, K active of E routed experts, D documents, C slots.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from consistency_reg import kernels
from consistency_reg.functional.policies import priorities_of
from consistency_reg.functional.segments import (
    check_segment_lengths,
    document_positions,
    row_chunks,
    side_by_side,
)
from consistency_reg.functional.stack import Columns, column_groups, stack_hits
from consistency_reg.routing import RoutingTrace

POLICIES = ("lru", "lfu", "belady", "fixed")
SIMULATED = ("lru", "lfu", "belady", "sch", "uses")  # "uses" counts the uses of each expert instead of hits
CHUNK_ACCESSES = 2**22  # that are looked at together: bounds memory, and leaves enough documents to work on at once


@dataclass(frozen=True)
class HitCounts:
    """What the hit rates of a cache need to know of some documents: integers, to be concatenated over batches.

    Attributes:
        hits: [D, E] int64, with a cache of 1, 2, ..., E slots; for "uses" the uses of each expert.
        accesses: [D] int64, tokens x K of each document.
        rows: [D] int64, the row of the batch that each document stands in; documents are in reading order.
    """

    hits: Tensor
    accesses: Tensor
    rows: Tensor

    @property
    def hit_rate(self) -> Tensor:
        """The hit rate of each document: [D, E] float64."""
        return self.hits / self.accesses[:, None].double()


@dataclass(frozen=True)
class RowHitRates:
    """The hit rates of the documents of each row, summed: what can be counted without knowing how many there are.

    Attributes:
        hit_rate: [N, E] float64, the sum over a row's documents of their hit rates with 1, 2, ..., E slots.
        documents: [N] int64, how many documents each row has.
    """

    hit_rate: Tensor
    documents: Tensor


def cache_hit_rate(
    expert_ids: Tensor | Sequence[Tensor],
    num_experts: int | Sequence[int],
    policy: str = "lru",
    valid: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> Tensor:
    """Hit rate of a cache of experts for every size, the mean over documents of equal weight.

    ``hits / (T K)`` of a document. Priorities: "lru" the more recent use; "lfu" more uses in the document so far;
    "belady" the nearer next use, by token; all with ties to the more recent use. "fixed" is a set that never changes
    and is resident from the start, the experts that the whole given data uses most (the lower id on ties), the set
    that static SRP is about. Memory beyond the result does not grow with N.

    Args:
        expert_ids: [N, T, K] int64, one layer; or a list with one for each layer, for one cache that all layers share
            (the accesses of a token are those of the first layer, then those of the second, ...).
        num_experts: E; one for all layers or one for each.
        policy: "lru", "lfu", "belady" or "fixed".
        valid: [N, T] bool, True for real tokens; all when None.
        document_ids: [N, T] integers; one document a row when None.

    Returns:
        [E] float64, the hit rate with a cache of 1, 2, ..., E slots (the sum of E for a list of layers).

    Raises:
        TypeError: ids that are not int64, masks of a wrong dtype.
        ValueError: shapes that do not match, K > E, ids out of range or repeated within a token, an unknown policy, no
            valid token.

    Example:
        >>> ids = torch.tensor([[[0, 1], [0, 2], [0, 1], [0, 2]]])
        >>> cache_hit_rate(ids, 3, "lru"), cache_hit_rate(ids, 3, "belady")
        (tensor([0.1250, 0.6250, 1.0000], dtype=torch.float64), tensor([0.1250, 0.6250, 1.0000], dtype=torch.float64))
    """
    _check_policy(policy, POLICIES)
    trace = checked_trace(expert_ids, num_experts, valid, document_ids)
    if policy != "fixed":
        return mean_hit_rate(simulate(trace, policy))
    usage_E = torch.stack([part.hits.sum(dim=0) for part in simulate(trace, "uses")]).sum(dim=0)
    return mean_hit_rate(simulate(trace, "uses"))[most_used(usage_E)].cumsum(dim=0)


def cache_hit_counts(
    expert_ids: Tensor | Sequence[Tensor],
    num_experts: int | Sequence[int],
    policy: str = "lru",
    valid: Tensor | None = None,
    document_ids: Tensor | None = None,
    *,
    segment_length: int = 1,
) -> HitCounts:
    """The hits of each document, see :func:`cache_hit_rate`. Ids are not checked, only their shape.

    Layers of equal E and K may stand below each other as more rows: they are simulated at once.

    Args:
        expert_ids, num_experts, valid, document_ids: see :func:`cache_hit_rate`.
        policy: "lru", "lfu", "belady", "fixed", or "sch" with windows of ``segment_length`` tokens; "uses" counts the
            uses of each expert instead of hits.
        segment_length: m of "sch".

    Example:
        >>> counts = cache_hit_counts(torch.tensor([[[0], [1], [0]]]), 2, "lru")
        >>> counts.hits.tolist(), counts.accesses.tolist()
        ([[1, 3]], [3])
    """
    _check_policy(policy, (*SIMULATED, "fixed"))
    trace = RoutingTrace(_layers(expert_ids), num_experts, valid=valid, document_ids=document_ids)
    parts = list(simulate(trace, "uses" if policy == "fixed" else policy, segment_length))
    hits_DE, accesses_D, rows_D = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("hits", "accesses", "rows")
    )
    if policy == "fixed":
        hits_DE = hits_DE[:, most_used(hits_DE.sum(dim=0))].cumsum(dim=1)
    return HitCounts(hits_DE, accesses_D, rows_D)


def row_hit_rates(trace: RoutingTrace, policy: str, segment_length: int = 1) -> RowHitRates:
    """What a mean over documents needs, by row instead of by document: on a GPU the host never waits for it.

    Args:
        trace: N rows; several layers are one cache that they share. Only shapes are checked.
        policy: as of :func:`cache_hit_counts`; instead of "fixed" there is "uses", the share of a document's accesses
            that each expert has, from which the hit rates of the fixed set follow once all data is seen.
        segment_length: m of "sch".

    Example:
        >>> trace = RoutingTrace([torch.tensor([[[0], [1], [0]], [[1], [1], [1]]])], num_experts=2)
        >>> rates = row_hit_rates(trace, "lru")
        >>> rates.hit_rate.sum(dim=0) / rates.documents.sum()
        tensor([0.6667, 1.0000], dtype=torch.float64)
    """
    _check_policy(policy, SIMULATED)
    _check_one_length(segment_length)
    rates, documents = [], []
    for _, ids, E, position_BT in _chunks(trace):
        if kernels.takes(ids):
            from consistency_reg.kernels import cache

            rates_BE = cache.row_hit_rates(ids, E, position_BT, policy, segment_length)
        else:
            part = _count_hits(ids, E, position_BT, policy, segment_length, whole_rows=_whole_rows(trace))
            rates_BE = torch.zeros(len(ids), E, dtype=torch.float64, device=ids.device)
            rates_BE.index_add_(0, part.rows, part.hit_rate)
        rates.append(rates_BE)
        documents.append((position_BT == 0).sum(dim=1))
    return RowHitRates(torch.cat(rates), torch.cat(documents))


def simulate(trace: RoutingTrace, policy: str, segment_length: int = 1) -> Iterator[HitCounts]:
    """The hits of the documents, some rows at a time; several layers are one cache that they share.

    Policies as of :func:`row_hit_rates`.
    """
    _check_one_length(segment_length)
    for rows, ids, E, position_BT in _chunks(trace):
        part = _count_hits(ids, E, position_BT, policy, segment_length, whole_rows=_whole_rows(trace))
        yield HitCounts(part.hits, part.accesses, part.rows + rows.start)


def mean_hit_rate(parts: Iterable[HitCounts]) -> Tensor:
    """[E] float64, the mean over documents; raises ValueError where there are none."""
    rates_PE, documents_P = zip(*((part.hit_rate.sum(dim=0), len(part.rows)) for part in parts), strict=True)
    if sum(documents_P) == 0:
        raise ValueError("expert_ids must hold at least one valid token, got none")
    return torch.stack(rates_PE).sum(dim=0) / sum(documents_P)


def most_used(usage: Tensor) -> Tensor:
    """The experts by their usage [E], the lower id first on ties: what a fixed set of any size begins with.

    Example:
        >>> most_used(torch.tensor([3, 7, 3]))
        tensor([1, 0, 2])
    """
    return usage.argsort(descending=True, stable=True)


def checked_trace(
    expert_ids: Tensor | Sequence[Tensor],
    num_experts: int | Sequence[int],
    valid: Tensor | None,
    document_ids: Tensor | None,
) -> RoutingTrace:
    """One layer or several as a trace whose values are checked too."""
    trace = RoutingTrace(_layers(expert_ids), num_experts, valid=valid, document_ids=document_ids)
    trace.check_values()
    return trace


def _layers(expert_ids: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return [expert_ids] if isinstance(expert_ids, Tensor) else expert_ids


def _check_policy(policy: str, known: tuple[str, ...]) -> None:
    if policy not in known:
        raise ValueError(f"policy must be one of {known}, got {policy!r}")


def _check_one_length(segment_length: int) -> None:
    if not isinstance(segment_length, int):
        raise TypeError(f"segment_length must be one integer number of tokens, got {segment_length!r}")
    check_segment_lengths(segment_length, name="segment_length")


def _chunks(trace: RoutingTrace) -> Iterator[tuple[slice, Tensor, int, Tensor]]:
    """Some rows at a time, their ids [B, T, K] and E with the layers side by side, and positions [B, T]."""
    (N, T), experts = trace.shape, [layer.num_experts for layer in trace]
    for rows in row_chunks(N, T * sum(layer.top_k for layer in trace), CHUNK_ACCESSES):
        ids_BTK = side_by_side([layer[rows] for layer in trace.expert_ids], experts)
        masks = [None if mask is None else mask[rows] for mask in (trace.valid, trace.document_ids)]
        yield rows, ids_BTK, sum(experts), document_positions((len(ids_BTK), T), *masks, device=ids_BTK.device)


def _whole_rows(trace: RoutingTrace) -> bool:
    return trace.valid is None and trace.document_ids is None


def _count_hits(
    ids_BTK: Tensor, E: int, position_BT: Tensor, policy: str, segment_length: int, *, whole_rows: bool
) -> HitCounts:
    rows_D, first_D, length_D = _documents(position_BT, whole_rows=whole_rows)
    K = ids_BTK.shape[-1]
    if kernels.takes(ids_BTK):
        from consistency_reg.kernels.cache import document_hits

        hits_DE = document_hits(ids_BTK, E, position_BT, len(rows_D), policy, segment_length)
    elif policy == "uses":
        document_S = torch.arange(len(rows_D), device=ids_BTK.device).repeat_interleave(length_D)
        bin_SK = document_S[:, None] * E + ids_BTK[position_BT >= 0]
        hits_DE = torch.bincount(bin_SK.flatten(), minlength=len(rows_D) * E).view(-1, E)
    else:
        hits_DE = torch.zeros(len(rows_D), E, dtype=torch.int64, device=ids_BTK.device)
        with torch.inference_mode():  # half the cost of a small operation
            for group in column_groups(length_D, E, K):
                columns = Columns(ids_BTK.flatten(0, 1), E, first_D[group], length_D[group])
                hits_DE[group] = stack_hits(priorities_of(policy, columns, segment_length))
    return HitCounts(hits_DE, length_D * K, rows_D)


def _documents(position_NT: Tensor, *, whole_rows: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Row, first token (counted over all rows) and length of each document, in reading order: [D] each.

    Waits for a GPU to learn D, unless every row is one document.
    """
    N, T = position_NT.shape
    if whole_rows:
        rows_D = torch.arange(N if T else 0, device=position_NT.device)
        return rows_D, rows_D * T, torch.full_like(rows_D, T)
    position_S = position_NT.flatten()
    first_D = (position_S == 0).nonzero()[:, 0]
    following_S = torch.cat([position_S[1:], position_S.new_full((1,), -1)])
    last_S = (position_S >= 0) & (following_S <= 0)
    return first_D // max(T, 1), first_D, position_S[last_S] + 1
