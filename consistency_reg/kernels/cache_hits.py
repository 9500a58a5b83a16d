"""The caches of :mod:`consistency_reg.functional.cache_hits` on a GPU: a program simulates a document at every size.

The stack of :mod:`consistency_reg.functional.stack` lives in registers, an expert a lane, as keys of (priority, clock
of the last use, expert). What walks down the stack as a carry on a CPU is a scan here: an entry that is lower than all
above it moves on, and the lowest of those takes its place. Experts that a document has not used yet lie below all
others with negative keys, so that the stack always holds every expert.

N rows, T tokens, K experts per token, E experts, D documents, X = E rounded up to a power of two.
"""
# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from consistency_reg.cache_policies import CACHE_POLICIES
from consistency_reg.functional.cache_simulation import Simulation
from consistency_reg.functional.row_accesses import RowAccesses
from consistency_reg.routing.documents import document_lengths

SEGMENT_TOKENS = 512  # a program simulates the documents that start in so many tokens of a row
INT32_BITS = 30  # of a key; one more is its sign, and one key is lower than all


def document_hits(
    expert_ids: Tensor, num_experts: int, position: Tensor, num_documents: int, simulation: Simulation
) -> Tensor:
    """Return the hits of each document with a cache of 1..E slots, documents in reading order: [D, E] int64.

    Never makes the host wait. The replay of ``simulation`` has to be done already.

    Args:
        expert_ids: [N, T, K] int64.
        num_experts: E.
        position: [N, T] index of each token in its document, -1 on padding.
        num_documents: D.
        simulation: the policy and how hits are counted.
    """
    hits_DE = torch.empty(num_documents, num_experts, dtype=torch.int64, device=expert_ids.device)
    document_NT = (position == 0).flatten().cumsum(0).sub_(1)
    _launch(expert_ids, num_experts, position, simulation, hits_DE, document_NT)
    return hits_DE


def row_hit_rates(expert_ids: Tensor, num_experts: int, position: Tensor, simulation: Simulation) -> Tensor:
    """Return the sum of the hit rates of each row's documents, [N, E] float64; see :func:`document_hits`."""
    N, T, _ = expert_ids.shape
    segments = triton.cdiv(T, SEGMENT_TOKENS)
    rates_NSE = torch.empty(N, segments, num_experts, dtype=torch.float64, device=expert_ids.device)
    _launch(expert_ids, num_experts, position, simulation, rates_NSE, None)
    return rates_NSE.sum(dim=1)


def _launch(
    expert_ids: Tensor,
    num_experts: int,
    position: Tensor,
    simulation: Simulation,
    out: Tensor,
    document: Tensor | None,
) -> None:
    N, T, K = expert_ids.shape
    if N * T == 0:
        return
    lanes = max(triton.next_power_of_2(num_experts), 2)
    priority_NTK, largest = _priorities(expert_ids, num_experts, position, simulation)
    expert_bits, clock_bits = lanes.bit_length() - 1, (T * K).bit_length()
    bits = expert_bits + clock_bits + largest.bit_length()
    key = tl.int32 if bits <= INT32_BITS else tl.int64
    if priority_NTK is not None:
        priority_NTK = priority_NTK.to(torch.int32)
    with torch.cuda.device_of(expert_ids):  # Triton launches on the current one
        _simulate[(N, triton.cdiv(T, SEGMENT_TOKENS))](
            expert_ids.contiguous(),
            _document_starts(position),
            document_lengths(position).int(),
            priority_NTK,
            document,
            out,
            T,
            K,
            num_experts,
            simulation.segment_length,
            SCH=simulation.policy == "sch",
            COLD_HITS=simulation.cold == "free",
            EXPERT_BITS=expert_bits,
            CLOCK_BITS=clock_bits,
            BITS=bits,
            KEY=key,
            SEGMENT=SEGMENT_TOKENS,
            X=lanes,
            num_warps=max(1, min(8, lanes // 128)),
        )


def _priorities(
    expert_ids: Tensor, num_experts: int, position: Tensor, simulation: Simulation
) -> tuple[Tensor | None, int]:
    """Return the priority of each access, [N, T, K] or None where there is none, and an upper bound of priorities."""
    if simulation.policy == "sch":
        return None, min(simulation.segment_length, expert_ids.shape[1])
    of_access = CACHE_POLICIES[simulation.policy].priority
    assert of_access is not None
    priority = of_access(RowAccesses(expert_ids, num_experts, position))
    return priority.values, priority.largest


def _document_starts(position: Tensor) -> Tensor:
    """Return for each token the next one, from it on, at which a document starts, T if none: [N, T] int32."""
    T = position.shape[1]
    index_T = torch.arange(T, dtype=torch.int32, device=position.device)
    return torch.where(position == 0, index_T, T).flip(1).cummin(dim=1).values.flip(1).int()


@triton.jit
def _lowest_and_the_one_before(lowest, before, next_lowest, next_before):
    """Combine the lowest keys of two stretches of the stack, and the lowest above each of them."""
    is_lower = next_lowest < lowest
    before = tl.where(is_lower, tl.minimum(next_before, lowest), before)
    return tl.minimum(lowest, next_lowest), before


@triton.jit
def _simulate(
    ids,
    starts,
    lengths,
    priorities,
    document,
    out,
    T,
    K,
    E,
    m,
    SCH: tl.constexpr,
    COLD_HITS: tl.constexpr,
    EXPERT_BITS: tl.constexpr,
    CLOCK_BITS: tl.constexpr,
    BITS: tl.constexpr,
    KEY: tl.constexpr,
    SEGMENT: tl.constexpr,
    X: tl.constexpr,
):
    """Simulate the documents that start in a segment of a row; write the hits of each, or the sum of their rates."""
    USE: tl.constexpr = 1 << (CLOCK_BITS + EXPERT_BITS)  # one more in the priority
    USED: tl.constexpr = 1 << BITS  # sets experts that were used apart from others; higher than any key
    LOWEST: tl.constexpr = -2 * USED
    row = tl.program_id(0).to(tl.int64) * T
    t = tl.program_id(1) * SEGMENT
    stop = tl.minimum(t + SEGMENT, T)
    lanes = tl.arange(0, X)
    rates = tl.zeros((X,), tl.float64)
    t = tl.load(starts + row + t)
    while t < stop:
        length = tl.load(lengths + row + t)
        first = (row + t) * K
        keys = lanes.to(KEY) - USED
        reused = tl.zeros((X,), tl.int32)
        if SCH:
            for access in range(0, tl.minimum(m - 1, length) * K):
                expert = tl.load(ids + first + access).to(KEY)
                keys += tl.where((keys & (X - 1)) == expert, USE, 0).to(KEY)
        for i in range(0, length):
            token = first + i * K
            if SCH:  # known when it is compiled, what follows is not  # noqa: SIM102
                if i + m - 1 < length:
                    for k in range(0, K):
                        expert = tl.load(ids + token + (m - 1) * K + k).to(KEY)
                        keys += tl.where((keys & (X - 1)) == expert, USE, 0).to(KEY)
            for k in range(0, K):
                expert = tl.load(ids + token + k).to(KEY)
                reused += tl.where(((keys & (X - 1)) == expert) & (keys >= 0), 1, 0)
            for k in range(0, K):
                expert = tl.load(ids + token + k).to(KEY)
                own = (keys & (X - 1)) == expert
                old = tl.sum(tl.where(own, keys, 0), 0).to(KEY)
                old = tl.where(old < 0, old + USED, old)
                new = ((i * K + k + 1).to(KEY) << EXPERT_BITS) + expert
                if SCH:
                    new += (old & -USE) - USE
                if priorities is not None:
                    new += tl.load(priorities + token + k).to(KEY) * USE
                others = tl.where(own, LOWEST, keys)
                none = tl.full((X,), USED, KEY)
                so_far, before = tl.associative_scan((others, none), 0, _lowest_and_the_one_before)
                # Where an entry is the lowest so far, the lowest above it takes its place.
                keys = tl.where(lanes == 0, new, tl.where(others == so_far, before, keys))
        hits = tl.cumsum(reused, 0)
        if COLD_HITS:
            hits += tl.minimum(lanes + 1, tl.sum(tl.where(keys >= 0, 1, 0), 0))
        if document is None:
            rates += hits.to(tl.float64) / (length * K).to(tl.float64)
        else:
            tl.store(out + tl.load(document + row + t) * E + lanes, hits.to(tl.int64), mask=lanes < E)
        t += length
        if t < stop:
            t = tl.load(starts + row + t)
    if document is None:
        segment = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        tl.store(out + segment * E + lanes, rates, mask=lanes < E)
