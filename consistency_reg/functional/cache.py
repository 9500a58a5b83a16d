"""Hit rates of cache policies on recorded routing, for every cache size at once: LRU, LFU, Belady and the fixed set.

A cache of experts that starts empty with each document. Counting, the same for every policy (and for SCH, see
:mod:`~consistency_reg.functional.sch`):

1. hits of a token are counted for its K experts against the cache as it was before the token; an expert that was never
   used before hits when the cache has a free slot left, and each such first use of a token takes a slot of its own;
2. then each of the K experts in turn becomes resident, and if the cache is full the resident with the lowest priority
   other than itself is evicted.

N rows, T tokens, K active of E routed experts, D documents, C slots.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from consistency_reg import kernels
from consistency_reg.functional.policies import priorities_of
from consistency_reg.functional.segments import document_positions
from consistency_reg.functional.srp import check_segment_lengths
from consistency_reg.functional.stack import Columns, column_groups, stack_hits
from consistency_reg.routing import RoutingTrace, check_id_shape, check_masks

POLICIES = ("lru", "lfu", "belady", "fixed")


@dataclass(frozen=True)
class HitCounts:
    """What the hit rates of a cache need to know of some documents: integers, to be concatenated over batches.

    Attributes:
        hits: [D, E] int64, with a cache of 1, 2, ..., E slots.
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

    Priorities: "lru" the more recent use; "lfu" more uses in the document so far; "belady" the nearer next use, by
    token; all with ties to the more recent use. "fixed" is a set that never changes and is resident from the start, the
    experts that the whole given data uses most (the lower id on ties), the set that static SRP is about.

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
    counts = cache_hit_counts(*one_cache(expert_ids, num_experts, valid, document_ids), policy, valid, document_ids)
    return mean_hit_rate(counts)


def cache_hit_counts(
    expert_ids: Tensor,
    num_experts: int,
    policy: str = "lru",
    valid: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> HitCounts:
    """The hits of each document, see :func:`cache_hit_rate`. Ids are not checked, only their shape.

    Layers of equal E and K may stand below each other as more rows: they are simulated at once.

    Example:
        >>> counts = cache_hit_counts(torch.tensor([[[0], [1], [0]]]), 2, "lru")
        >>> counts.hits.tolist(), counts.accesses.tolist()
        ([[1, 3]], [3])
    """
    _check_policy(policy, POLICIES)
    if policy == "fixed":
        return _fixed_set_counts(expert_ids, num_experts, valid, document_ids)
    return count_hits(expert_ids, num_experts, policy, valid, document_ids)


def count_hits(
    expert_ids: Tensor,
    num_experts: int,
    policy: str,
    valid: Tensor | None = None,
    document_ids: Tensor | None = None,
    segment_length: int = 1,
) -> HitCounts:
    """The hits of each document with "lru", "lfu", "belady", or "sch" with windows of ``segment_length`` tokens."""
    _check_one_length(segment_length)
    position_NT = _positions(expert_ids, num_experts, valid, document_ids)
    rows_D, first_D, length_D = _documents(position_NT, whole_rows=valid is None and document_ids is None)
    K = expert_ids.shape[-1]
    if kernels.takes(expert_ids):
        from consistency_reg.kernels.cache import document_hits

        hits_DE = document_hits(expert_ids, num_experts, position_NT, len(rows_D), policy, segment_length)
        return HitCounts(hits_DE, length_D * K, rows_D)
    hits_DE = torch.zeros(len(rows_D), num_experts, dtype=torch.int64, device=expert_ids.device)
    with torch.inference_mode():  # half the cost of a small operation
        for group in column_groups(length_D, num_experts, K):
            columns = Columns(expert_ids.flatten(0, 1), num_experts, first_D[group], length_D[group])
            hits_DE[group] = stack_hits(priorities_of(policy, columns, segment_length))
    return HitCounts(hits_DE, length_D * K, rows_D)


def row_hit_rates(
    expert_ids: Tensor,
    num_experts: int,
    policy: str,
    valid: Tensor | None = None,
    document_ids: Tensor | None = None,
    *,
    segment_length: int = 1,
) -> RowHitRates:
    """What a mean over documents needs, by row instead of by document: on a GPU the host never waits for it.

    Args:
        expert_ids: [N, T, K] int64; only the shape is checked.
        num_experts: E.
        policy: "lru", "lfu", "belady", "sch"; or "uses" for the share of accesses of each expert, from which the hit
            rates of the fixed set follow once all data is seen.
        valid, document_ids: [N, T], see :func:`cache_hit_rate`.
        segment_length: m of "sch".

    Example:
        >>> rates = row_hit_rates(torch.tensor([[[0], [1], [0]], [[1], [1], [1]]]), 2, "lru")
        >>> rates.hit_rate.sum(dim=0) / rates.documents.sum()
        tensor([0.6667, 1.0000], dtype=torch.float64)
    """
    _check_policy(policy, ("lru", "lfu", "belady", "sch", "uses"))
    _check_one_length(segment_length)
    position_NT = _positions(expert_ids, num_experts, valid, document_ids)
    documents_N = (position_NT == 0).sum(dim=1)
    if kernels.takes(expert_ids):
        from consistency_reg.kernels import cache

        rates_NE = cache.row_hit_rates(expert_ids, num_experts, position_NT, policy, segment_length)
        return RowHitRates(rates_NE, documents_N)
    if policy == "uses":
        rows_D, _, length_D = _documents(position_NT)
        uses_DE = document_usage(expert_ids, num_experts, valid, document_ids)
        counts = HitCounts(uses_DE, length_D * expert_ids.shape[-1], rows_D)
    else:
        counts = count_hits(expert_ids, num_experts, policy, valid, document_ids, segment_length)
    rates_NE = torch.zeros(len(expert_ids), num_experts, dtype=torch.float64, device=expert_ids.device)
    return RowHitRates(rates_NE.index_add_(0, counts.rows, counts.hit_rate), documents_N)


def document_usage(
    expert_ids: Tensor,
    num_experts: int,
    valid: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> Tensor:
    """How many tokens of each document every expert is active on: [D, E] int64.

    Enough for the fixed set over many batches: its hits with C slots are the sum over the C experts of most use.

    Example:
        >>> document_usage(torch.tensor([[[0], [1], [0]]]), 3)
        tensor([[2, 1, 0]])
    """
    position_NT = _positions(expert_ids, num_experts, valid, document_ids)
    rows_D, _, length_D = _documents(position_NT, whole_rows=valid is None and document_ids is None)
    if kernels.takes(expert_ids):
        from consistency_reg.kernels.cache import document_hits

        return document_hits(expert_ids, num_experts, position_NT, len(rows_D), "uses")
    ids_SK = expert_ids.flatten(0, 1) if valid is None else expert_ids[valid]
    document_S = torch.arange(len(rows_D), device=expert_ids.device).repeat_interleave(length_D)
    cells = len(rows_D) * num_experts
    return torch.bincount((document_S[:, None] * num_experts + ids_SK).flatten(), minlength=cells).view(-1, num_experts)


def mean_hit_rate(counts: HitCounts) -> Tensor:
    """[E] float64, the mean over documents; raises ValueError where there are none."""
    if len(counts.rows) == 0:
        raise ValueError("expert_ids must hold at least one valid token, got none")
    return counts.hit_rate.mean(dim=0)


def one_cache(
    expert_ids: Tensor | Sequence[Tensor],
    num_experts: int | Sequence[int],
    valid: Tensor | None,
    document_ids: Tensor | None,
) -> tuple[Tensor, int]:
    """The ids and E of one layer, or of layers side by side (ids of each behind those of the one before); checked."""
    layers = [expert_ids] if isinstance(expert_ids, Tensor) else expert_ids
    trace = RoutingTrace(layers, num_experts, valid=valid, document_ids=document_ids)
    trace.check_values()
    ids, total = [], 0
    for layer in trace:
        ids.append(layer.expert_ids + total if total else layer.expert_ids)
        total += layer.num_experts
    return torch.cat(ids, dim=-1) if len(ids) > 1 else ids[0], total


def _positions(expert_ids: Tensor, num_experts: int, valid: Tensor | None, document_ids: Tensor | None) -> Tensor:
    check_id_shape(expert_ids, num_experts)
    N, T, _ = expert_ids.shape
    check_masks((N, T), valid, document_ids)
    return document_positions((N, T), valid, document_ids, device=expert_ids.device)


def _check_policy(policy: str, known: tuple[str, ...]) -> None:
    if policy not in known:
        raise ValueError(f"policy must be one of {known}, got {policy!r}")


def _check_one_length(segment_length: int) -> None:
    if isinstance(segment_length, Sequence):
        raise TypeError(f"segment_length must be one integer number of tokens, got {segment_length!r}")
    check_segment_lengths(segment_length)


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


def _fixed_set_counts(
    expert_ids: Tensor, num_experts: int, valid: Tensor | None, document_ids: Tensor | None
) -> HitCounts:
    uses_DE = document_usage(expert_ids, num_experts, valid, document_ids)
    rows_D, _, length_D = _documents(_positions(expert_ids, num_experts, valid, document_ids))
    by_usage = uses_DE.sum(dim=0).argsort(descending=True, stable=True)
    return HitCounts(uses_DE[:, by_usage].cumsum(dim=1), length_D * expert_ids.shape[-1], rows_D)
