"""Compute hit rates of LRU, LFU, Belady and the fixed set on recorded routing, for every cache size at once.

A cache of experts that starts empty with each document. Counting, the same for every policy (and for SCH, see
:mod:`~consistency_reg.functional.sch`):

1. hits of a token are counted for its K experts against the cache as it was before the token; an expert that was never
   used before hits when the cache has a free slot left, and each such first use of a token takes a slot of its own;
2. then each of the K experts in turn becomes resident, and if the cache is full the resident with the lowest priority
   other than itself is evicted.

That is replay by token. By access, each of the K experts is looked up and becomes resident before the next is looked
up, as in an engine that loads an expert when it comes to it. First uses may also be counted as misses. The policies are
those of :mod:`~consistency_reg.cache_policies`.

N rows, T tokens, K active of E routed experts, D documents, C slots.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from consistency_reg.cache_policies import check_policy
from consistency_reg.functional.cache_simulation import SIMULATED, HitCounts, Simulation, document_uses, simulate
from consistency_reg.routing import RoutingTrace


def cache_hit_rate(
    expert_ids: Tensor | Sequence[Tensor],
    num_experts: int | Sequence[int],
    policy: str = "lru",
    valid: Tensor | None = None,
    document_ids: Tensor | None = None,
    *,
    replay: str = "token",
    cold: str = "free",
) -> Tensor:
    """Return the hit rate of a cache of experts for every size, the mean over documents of equal weight.

    ``hits / (T K)`` of a document. The expert that stays longer: "lru" the more recently used; "lfu" the one with more
    uses in the document so far; "belady" the one that is accessed sooner, those of one later token in the order of its
    accesses; all with ties to the more recent use. "fixed" is a set that never changes and is resident from the start,
    the experts that the whole given data uses most (the lower id on ties), the set that static SRP is about. Memory
    beyond the result does not grow with N.

    Args:
        expert_ids: [N, T, K] int64, one layer; or a list with one for each layer, for one cache that all layers share
            (the accesses of a token are those of the first layer, then those of the second, ...).
        num_experts: E; one for all layers or one for each.
        policy: "lru", "lfu", "belady" or "fixed".
        valid: [N, T] bool, True for real tokens; all when None.
        document_ids: [N, T] integers; one document a row when None.
        replay: "token" looks the K experts of a token up together and then makes them resident, as SCH does; "access"
            one by one in the router's order, each resident before the next is looked up. Engines differ in this.
        cold: "free" counts the first use of an expert as a hit where the cache has a free slot, as SCH does; "miss" as
            a miss. No matter to "fixed".

    Returns:
        [E] float64, the hit rate with a cache of 1, 2, ..., E slots (the sum of E for a list of layers).

    Raises:
        TypeError: ids that are not int64, masks of a wrong dtype.
        ValueError: shapes that do not match, K > E, ids out of range or repeated within a token, an unknown policy,
            replay or way to count first uses, no valid token.

    Example:
        >>> ids = torch.tensor([[[0, 1], [0, 2], [0, 1], [0, 2]]])
        >>> cache_hit_rate(ids, 3, "lru"), cache_hit_rate(ids, 3, "belady")
        (tensor([0.1250, 0.6250, 1.0000], dtype=torch.float64), tensor([0.1250, 0.6250, 1.0000], dtype=torch.float64))
        >>> cache_hit_rate(ids, 3, "lru", replay="access", cold="miss")
        tensor([0.0000, 0.3750, 0.6250], dtype=torch.float64)
    """
    check_policy(policy)
    simulation = Simulation("lru" if policy == "fixed" else policy, replay=replay, cold=cold)
    trace = checked_trace(expert_ids, num_experts, valid, document_ids)
    if policy != "fixed":
        return mean_over_documents((part.hit_rate, len(part.rows)) for part in simulate(trace, simulation))
    usage_E = torch.zeros(
        sum(layer.num_experts for layer in trace), dtype=torch.int64, device=trace.expert_ids[0].device
    )
    parts = []
    for part in document_uses(trace):
        usage_E += part.uses.sum(dim=0)
        parts.append((part.share.sum(dim=0, keepdim=True), len(part.rows)))
    return mean_over_documents(parts)[most_used(usage_E)].cumsum(dim=0)


def cache_hit_counts(
    expert_ids: Tensor | Sequence[Tensor],
    num_experts: int | Sequence[int],
    policy: str = "lru",
    valid: Tensor | None = None,
    document_ids: Tensor | None = None,
    *,
    segment_length: int = 1,
    replay: str = "token",
    cold: str = "free",
) -> HitCounts:
    """Return the hits of each document, see :func:`cache_hit_rate`. Ids are not checked, only their shape.

    Layers of equal E and K may stand below each other as more rows: they are simulated at once.

    Args:
        expert_ids, num_experts, valid, document_ids, replay, cold: see :func:`cache_hit_rate`.
        policy: "lru", "lfu", "belady", "fixed", or "sch" with windows of ``segment_length`` tokens.
        segment_length: m of "sch".

    Example:
        >>> counts = cache_hit_counts(torch.tensor([[[0], [1], [0]]]), 2, "lru")
        >>> counts.hits.tolist(), counts.accesses.tolist()
        ([[1, 3]], [3])
    """
    check_policy(policy, (*SIMULATED, "fixed"))
    trace = RoutingTrace(_layers(expert_ids), num_experts, valid=valid, document_ids=document_ids)
    simulation = Simulation("lru" if policy == "fixed" else policy, segment_length, replay, cold)
    if policy == "fixed":
        used = list(document_uses(trace))
        uses_DE, accesses_D, rows_D = (
            torch.cat([getattr(part, name) for part in used]) for name in ("uses", "accesses", "rows")
        )
        return HitCounts(uses_DE[:, most_used(uses_DE.sum(dim=0))].cumsum(dim=1), accesses_D, rows_D)
    parts = list(simulate(trace, simulation))
    return HitCounts(*(torch.cat([getattr(part, name) for part in parts]) for name in ("hits", "accesses", "rows")))


def mean_over_documents(parts: Iterable[tuple[Tensor, int]]) -> Tensor:
    """Return the mean over all documents, [E] float64, from parts that hold the values of some documents each.

    Args:
        parts: values [..., E], and the number of documents whose values these are or sum up.

    Raises:
        ValueError: there is no document.
    """
    sums_PE, documents_P = zip(*((values.sum(dim=0), documents) for values, documents in parts), strict=True)
    if sum(documents_P) == 0:
        raise ValueError("expert_ids must hold at least one valid token, got none")
    return torch.stack(sums_PE).sum(dim=0) / sum(documents_P)


def most_used(usage: Tensor) -> Tensor:
    """Return the experts by their usage [E], the lower id first on ties: what a fixed set of any size begins with.

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
    """Return one layer or several as a trace whose values are checked too."""
    trace = RoutingTrace(_layers(expert_ids), num_experts, valid=valid, document_ids=document_ids)
    trace.check_values()
    return trace


def _layers(expert_ids: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return [expert_ids] if isinstance(expert_ids, Tensor) else expert_ids
