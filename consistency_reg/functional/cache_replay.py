"""Caches of one size replayed access by access: which accesses hit, to compare with an engine that logged its own.

The curves of :mod:`~consistency_reg.functional.cache_hits` give every size at once; here one cache is simulated as it
is, so that layers may differ in the bytes of an expert, and each access says whether it hit.

N rows, T tokens, K active of E routed experts, C slots.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import accumulate, chain, groupby, pairwise

import torch
from torch import Tensor

from consistency_reg.cache_policies import CACHE_POLICIES, EVICTING, check_policy
from consistency_reg.functional.balance import usage_counts
from consistency_reg.functional.cache_hits import checked_trace, most_used
from consistency_reg.functional.cache_simulation import Simulation
from consistency_reg.functional.row_accesses import RowAccesses
from consistency_reg.functional.segments import side_by_side
from consistency_reg.routing import RoutingTrace


def cache_access_hits(
    expert_ids: Tensor | Sequence[Tensor],
    num_experts: int | Sequence[int],
    slots: int,
    policy: str = "lru",
    valid: Tensor | None = None,
    document_ids: Tensor | None = None,
    *,
    replay: str = "token",
    cold: str = "free",
    usage: Tensor | None = None,
) -> list[Tensor]:
    """Return which accesses hit a cache of C slots; their sums are those of ``cache_hit_counts``.

    Args:
        expert_ids: as :func:`~consistency_reg.functional.cache_hits.cache_hit_rate` takes them.
        num_experts: E of each layer.
        slots: C; of the one cache of all layers for a list of layers.
        policy: name of a policy in :mod:`consistency_reg.cache_policies`, or "fixed".
        valid: [B, T] bool, True for real tokens; all when None.
        document_ids: [B, T] integers; one document a row when None.
        replay: "token" or "access".
        cold: whether first uses are hits ("free") or misses ("miss").
        usage: [E] how often each expert was used in the data that "fixed" is chosen by; the given data when None.

    Returns:
        [N, T, K] bool for each layer, False on padding.

    Raises:
        TypeError, ValueError: see :func:`~consistency_reg.functional.cache_hits.cache_hit_rate`; also fewer than one
            slot.

    Example:
        >>> (hits,) = cache_access_hits(torch.tensor([[[0, 1], [2, 1], [0, 2]]]), 3, slots=2)
        >>> hits.tolist()
        [[[True, True], [False, True], [False, True]]]
    """
    check_policy(policy)
    simulation = Simulation("lru" if policy == "fixed" else policy, replay=replay, cold=cold)
    if slots < 1:
        raise ValueError(f"slots must be at least 1, got {slots}")
    trace = checked_trace(expert_ids, num_experts, valid, document_ids)
    experts = [layer.num_experts for layer in trace]
    ids_NTK = side_by_side(trace.expert_ids, experts)
    if policy == "fixed":
        if usage is None:
            usage = usage_counts(ids_NTK, sum(experts), trace.valid)
        hits_NTK = torch.isin(ids_NTK, most_used(usage)[:slots]) & trace.valid_mask[:, :, None]
    else:
        hits_NTK = _simulate_rows(ids_NTK, sum(experts), slots, simulation, trace)
    return list(hits_NTK.split([layer.top_k for layer in trace], dim=-1))


def _simulate_rows(
    ids_NTK: Tensor, num_experts: int, slots: int, simulation: Simulation, trace: RoutingTrace
) -> Tensor:
    position_NT = trace.positions
    key_NTK = _keys(ids_NTK, num_experts, position_NT, simulation.policy)
    hits_NTK = torch.zeros(ids_NTK.shape, dtype=torch.bool)
    for n, (ids_TK, keys_TK, position_T) in enumerate(
        zip(ids_NTK.tolist(), key_NTK.tolist(), position_NT.tolist(), strict=True)
    ):
        cache, known = Residents(), set[int]()
        for t, position in enumerate(position_T):
            if position == 0:
                cache, known = Residents(), set()
            if position < 0:
                continue
            accesses = list(zip(ids_TK[t], keys_TK[t], strict=True))
            together = [accesses] if simulation.replay == "token" else [[access] for access in accesses]
            hits = [hit for part in together for hit in _serve(cache, known, part, slots, simulation.cold)]
            hits_NTK[n, t] = torch.tensor(hits)
    return hits_NTK.to(ids_NTK.device)


def _serve(
    cache: "Residents", known: set[int], accesses: Sequence[tuple[int, int]], slots: int, cold: str
) -> Iterator[bool]:
    """Look the experts up together, yield whether each hits, then make each in turn resident."""
    free = slots - len(known) if cold == "free" else 0
    for expert, _ in accesses:
        if expert in known:
            yield expert in cache
        else:
            yield free > 0
            free -= 1
    for expert, key in accesses:
        known.add(expert)
        if expert not in cache and len(cache) == slots:
            cache.evict(())
        cache.put(expert, key)


@dataclass(frozen=True)
class EngineReplay:
    """Holds the contents of an engine's cache, access by access.

    Attributes:
        held: for each layer [T, K] bool, whether the cache held the expert before the layer's call.
        looked_up: for each layer [T, K] bool, the first access to each expert in a call; others are served by it.
        bytes_read: bytes of all misses; their number where bytes are not known.
    """

    held: Sequence[Tensor]
    looked_up: Sequence[Tensor]
    bytes_read: int

    @property
    def hits(self) -> int:
        """Return the number of look-ups that hit."""
        return sum(int((held & asked).sum()) for held, asked in zip(self.held, self.looked_up, strict=True))

    @property
    def misses(self) -> int:
        """Return the look-ups that missed, first uses included."""
        return sum(int(asked.sum()) for asked in self.looked_up) - self.hits

    @property
    def hit_rate(self) -> float:
        """Return the share of look-ups that hit."""
        return self.hits / max(self.hits + self.misses, 1)

    def bytes_of_calls(self, expert_bytes: Sequence[int], calls: Tensor) -> Tensor:
        """Return the bytes that each call read: one number for each run of equal ``calls``, int64.

        Args:
            expert_bytes: bytes of an expert of each layer.
            calls: [T] integers, as in :func:`replay_engine`.

        Example:
            >>> ids, calls = [torch.tensor([[0], [1], [0]])], torch.arange(3)
            >>> replay = replay_engine(ids, 2, 20, expert_bytes=[10], calls=calls)
            >>> replay.bytes_of_calls([10], calls).tolist()
            [10, 10, 0]
        """
        missed = [(asked & ~held).sum(dim=1) for held, asked in zip(self.held, self.looked_up, strict=True)]
        bytes_T = torch.stack([of_layer * size for of_layer, size in zip(missed, expert_bytes, strict=True)]).sum(dim=0)
        distinct, number_T = calls.unique_consecutive(return_inverse=True)
        return bytes_T.new_zeros(len(distinct)).index_add_(0, number_T, bytes_T)


def replay_engine(
    expert_ids: Sequence[Tensor],
    num_experts: int | Sequence[int],
    capacity: int | Sequence[int],
    *,
    policy: str = "lru",
    expert_bytes: Sequence[int] | None = None,
    calls: Tensor | None = None,
    routed: Sequence[Tensor] | None = None,
) -> EngineReplay:
    """Replay one stream of tokens through the cache of an engine that computes layer after layer.

    For each call (a token, or all tokens of a prompt), layer by layer: the layer's experts are looked up once each
    against the cache as it was; those that miss are read; then the experts with the lowest priority are evicted
    until the cache holds no more than its capacity, never those of this call. First uses are misses, and nothing is
    forgotten between documents.

    Args:
        expert_ids: [T, K] int64 for each layer, in the router's order.
        num_experts: E; one for all layers or one for each.
        capacity: slots, or bytes where ``expert_bytes`` is given: one number for one cache of all layers, or a sequence
            with one for the cache of each layer.
        policy: "lru", "lfu" or "belady".
        expert_bytes: bytes of an expert of each layer; every expert takes one slot when None.
        calls: [T] integers, the same for neighbouring tokens that the engine computed in one call; each token by
            itself when None.
        routed: for each layer [T] bool, the tokens that it computed: the last layer of a prompt may only need the last
            token; all when None.

    Raises:
        TypeError, ValueError: ids that are not int64 [T, K], out of range or repeated within a token; another policy;
            a number of capacities, bytes or calls that does not fit.

    Example:
        >>> layers = [torch.tensor([[0], [1], [0]]), torch.tensor([[0], [0], [0]])]
        >>> replay = replay_engine(layers, 2, capacity=2)
        >>> [held.flatten().tolist() for held in replay.held], replay.misses
        ([[False, False, False], [False, True, True]], 4)
    """
    check_policy(policy, EVICTING)
    trace = checked_trace([ids[None] for ids in expert_ids], num_experts, None, None)
    L, T = len(trace), trace.shape[1]
    sizes = [1] * L if expert_bytes is None else list(expert_bytes)
    if len(sizes) != L:
        raise ValueError(f"expert_bytes must have one entry for each of the {L} layers, got {len(sizes)}")
    if calls is not None and calls.shape != (T,):
        raise ValueError(f"calls must have shape [T] = [{T}], got {list(calls.shape)}")
    if routed is not None and [mask.shape for mask in routed] != [(T,)] * L:
        raise ValueError(f"routed must have shape [T] = [{T}] for each of the {L} layers")
    ends = _ends_of_calls(calls, T)
    masks = [torch.ones(T, dtype=torch.bool)] * L if routed is None else list(routed)
    if isinstance(capacity, int):
        parts = [_replay_cache(trace, list(range(L)), sizes, capacity, ends, masks, policy)]
    elif len(capacity) == L:
        parts = [_replay_cache(trace, [i], sizes, of_layer, ends, masks, policy) for i, of_layer in enumerate(capacity)]
    else:
        raise ValueError(f"capacity must be a number or have one for each of the {L} layers, got {len(capacity)}")
    held, looked_up, bytes_read = zip(*parts, strict=True)
    return EngineReplay(list(chain(*held)), list(chain(*looked_up)), sum(bytes_read))


def _ends_of_calls(calls: Tensor | None, T: int) -> list[int]:
    if calls is None:
        return list(range(T + 1))
    return [0, *accumulate(len(list(tokens)) for _, tokens in groupby(calls.tolist()))]


def _replay_cache(
    trace: RoutingTrace,
    layers: Sequence[int],
    sizes: Sequence[int],
    capacity: int,
    ends: Sequence[int],
    routed: Sequence[Tensor],
    policy: str,
) -> tuple[list[Tensor], list[Tensor], int]:
    """Return ``held``, ``looked_up`` and the bytes read of the layers that share one cache."""
    experts = [trace.layers[i].num_experts for i in layers]
    first = [sum(experts[:place]) for place in range(len(layers))]
    groups = [
        (place, trace.expert_ids[i][0, start:end][routed[i][start:end]] + first[place])
        for start, end in pairwise(ends)
        for place, i in enumerate(layers)
    ]
    stream = torch.cat([ids.flatten() for _, ids in groups]) if groups else torch.zeros(0, dtype=torch.int64)
    index = torch.arange(len(stream), device=stream.device)
    keys = iter(_keys(stream[None, :, None], sum(experts), index[None], policy).flatten().tolist())

    cache, used, read = Residents(), 0, 0
    held: list[list[bool]] = [[] for _ in layers]
    looked_up: list[list[bool]] = [[] for _ in layers]
    size_of = [sizes[i] for i, E in zip(layers, experts, strict=True) for _ in range(E)]
    for place, ids in groups:
        in_call: dict[int, bool] = {}  # whether the cache held it before
        for expert in ids.flatten().tolist():
            looked_up[place].append(expert not in in_call)
            if expert not in in_call:
                in_call[expert] = expert in cache
                if not in_call[expert]:
                    used += size_of[expert]
                    read += size_of[expert]
            held[place].append(in_call[expert])
            cache.put(expert, next(keys))
        while used > capacity and (evicted := cache.evict(in_call)) is not None:
            used -= size_of[evicted]

    def tensors(values: Sequence[list[bool]]) -> list[Tensor]:
        return [_at_tokens(row, trace.layers[i].top_k, routed[i]) for row, i in zip(values, layers, strict=True)]

    return tensors(held), tensors(looked_up), read


def _at_tokens(values: list[bool], top_k: int, routed: Tensor) -> Tensor:
    """Return the values of the tokens that were routed, in their order, as [T, K], False for the others."""
    at_tokens = torch.zeros(len(routed), top_k, dtype=torch.bool)
    at_tokens[routed.cpu()] = torch.tensor(values, dtype=torch.bool).view(-1, top_k)
    return at_tokens


def _keys(expert_ids: Tensor, num_experts: int, position: Tensor, policy: str) -> Tensor:
    """Return what the policy keeps each expert by after each access, the higher the longer: [N, T, K] int64."""
    of_access = CACHE_POLICIES[policy].priority
    assert of_access is not None
    accesses = RowAccesses(expert_ids, num_experts, position)
    clock_NTK = torch.arange(accesses.size, device=expert_ids.device).view(1, *expert_ids.shape[1:])
    values = of_access(accesses).values
    return clock_NTK.expand_as(expert_ids) if values is None else values * accesses.size + clock_NTK


class Residents:
    """The experts in a cache, each with its key: the lowest is evicted."""

    def __init__(self) -> None:
        self._key: dict[int, int] = {}
        self._heap: list[tuple[int, int]] = []  # of (key, expert), with entries whose key has changed since

    def __len__(self) -> int:
        return len(self._key)

    def __contains__(self, expert: int) -> bool:
        return expert in self._key

    def put(self, expert: int, key: int) -> None:
        """Make the expert resident, or change its key."""
        self._key[expert] = key
        heappush(self._heap, (key, expert))

    def evict(self, kept: Collection[int]) -> int | None:
        """Evict the expert with the lowest key that is not among ``kept``; return it, or None where there is none."""
        aside = []
        evicted = None
        while self._heap and evicted is None:
            key, expert = entry = heappop(self._heap)
            if self._key.get(expert) != key:
                continue
            if expert in kept:
                aside.append(entry)
            else:
                evicted = expert
                del self._key[expert]
        for entry in aside:
            heappush(self._heap, entry)
        return evicted
