"""Simulations of expert caches on a trace, some rows at a time: the hits and the uses of documents, and of rows.

How hits are counted: :mod:`~consistency_reg.functional.cache_hits`. N rows, T tokens, K active of E routed experts,
D documents.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from consistency_reg import devices
from consistency_reg.cache_policies import CACHE_POLICIES, EVICTING, check_policy
from consistency_reg.functional.segments import check_segment_lengths, side_by_side
from consistency_reg.functional.stack import Columns, Priorities, column_groups, stack_hits
from consistency_reg.functional.stack_priorities import PolicyPriorities, WindowUses
from consistency_reg.routing import RoutingTrace
from consistency_reg.routing.documents import document_ends, document_lengths, document_positions, row_chunks

SIMULATED = (*EVICTING, "sch")
REPLAYS = ("token", "access")
COLD = ("free", "miss")
CHUNK_ACCESSES = 2**22  # that are looked at together: bounds memory, and leaves enough documents to work on at once
KERNEL_CHUNK_ACCESSES = 2**24  # 4,096 documents of 512 x 8: a GPU of 132 multiprocessors works on 4,224 at once


@dataclass(frozen=True)
class Simulation:
    """Holds a policy to simulate, and how its hits are counted.

    Args:
        policy: "lru", "lfu", "belady", or "sch" with windows of ``segment_length`` tokens.
        segment_length: m of "sch".
        replay: "token" looks all experts of a token up before they become resident, "access" one by one.
        cold: "free" counts the first use of an expert as a hit where a slot is free, "miss" never.

    Raises:
        TypeError: a segment length that is not one integer.
        ValueError: an unknown policy, replay or way to count first uses; "sch" by access.
    """

    policy: str
    segment_length: int = 1
    replay: str = "token"
    cold: str = "free"

    def __post_init__(self) -> None:
        check_policy(self.policy, SIMULATED)
        if self.replay not in REPLAYS:
            raise ValueError(f"replay must be one of {REPLAYS}, got {self.replay!r}")
        if self.cold not in COLD:
            raise ValueError(f"cold must be one of {COLD}, got {self.cold!r}")
        if not isinstance(self.segment_length, int):
            raise TypeError(f"segment_length must be one integer number of tokens, got {self.segment_length!r}")
        check_segment_lengths(self.segment_length, name="segment_length")
        if self.policy == "sch" and self.replay != "token":
            raise ValueError(f"replay of 'sch' must be 'token', as its windows are of tokens, got {self.replay!r}")

    def priorities(self, columns: Columns) -> Priorities:
        """Return the keys of the columns' experts, see :mod:`~consistency_reg.functional.stack`."""
        if self.policy == "sch":
            return WindowUses(columns, self.segment_length)
        return PolicyPriorities(columns, CACHE_POLICIES[self.policy])


@dataclass(frozen=True)
class HitCounts:
    """Holds the hits and accesses of some documents: integers, to be concatenated over batches.

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
        """Return the hit rate of each document: [D, E] float64."""
        return self.hits / self.accesses[:, None].double()


@dataclass(frozen=True)
class UseCounts:
    """Holds the uses of each expert by some documents: integers, to be concatenated over batches.

    Attributes:
        uses: [D, E] int64.
        accesses, rows: see :class:`HitCounts`.
    """

    uses: Tensor
    accesses: Tensor
    rows: Tensor

    @property
    def share(self) -> Tensor:
        """Return the share of each document's accesses that each expert has: [D, E] float64."""
        return self.uses / self.accesses[:, None].double()


@dataclass(frozen=True)
class RowSums:
    """Values of the documents of each row, summed, which needs no count of the documents.

    Attributes:
        total: [N, E] float64, the sum over a row's documents of their hit rates with 1, 2, ..., E slots, or of the
            shares of their accesses that each of E experts has.
        documents: [N] int64, how many documents each row has.
    """

    total: Tensor
    documents: Tensor


def row_hit_rates(trace: RoutingTrace, simulation: Simulation) -> RowSums:
    """Return the hit rates of each row's documents, summed: on a GPU the host never waits for it.

    Args:
        trace: N rows; several layers are one cache that they share. Only shapes are checked.
        simulation: the policy and how its hits are counted.

    Example:
        >>> trace = RoutingTrace([torch.tensor([[[0], [1], [0]], [[1], [1], [1]]])], num_experts=2)
        >>> rates = row_hit_rates(trace, Simulation("lru"))
        >>> rates.total.sum(dim=0) / rates.documents.sum()
        tensor([0.6667, 1.0000], dtype=torch.float64)
    """
    device, trace = trace.expert_ids[0].device, _where_simulated(trace)
    rates, documents = [], []
    for _, ids, E, position_BT in _chunks(trace, by_access=simulation.replay == "access"):
        if devices.has_kernels(ids):
            from consistency_reg.kernels import cache_hits

            rates_BE = cache_hits.row_hit_rates(ids, E, position_BT, simulation)
        else:
            part = _count_hits(ids, E, position_BT, simulation, whole_rows=_whole_rows(trace))
            rates_BE = torch.zeros(len(ids), E, dtype=torch.float64, device=ids.device)
            rates_BE.index_add_(0, part.rows, part.hit_rate)
        rates.append(rates_BE)
        documents.append((position_BT == 0).sum(dim=1))
    return RowSums(torch.cat(rates).to(device), torch.cat(documents).to(device))


def row_use_shares(trace: RoutingTrace) -> RowSums:
    """Return the shares of their accesses that each expert has in each row's documents, summed.

    The hit rates of a fixed set follow from them once all data is seen. On a GPU the host never waits for it.

    Args:
        trace: N rows; several layers are one cache that they share. Only shapes are checked.

    Example:
        >>> trace = RoutingTrace([torch.tensor([[[0], [1], [0], [0]]])], num_experts=2)
        >>> row_use_shares(trace).total
        tensor([[0.7500, 0.2500]], dtype=torch.float64)
    """
    shares, documents = [], []
    for _, ids_BTK, E, position_BT in _chunks(trace):
        B, _, K = ids_BTK.shape
        access_share_BT = 1 / (document_lengths(position_BT) * K).clamp_min(1).double()
        bin_BTK = ids_BTK.where(position_BT[:, :, None] >= 0, E)  # the last bin takes padding
        share_BE = torch.zeros(B, E + 1, dtype=torch.float64, device=ids_BTK.device)
        share_BE.scatter_add_(1, bin_BTK.flatten(1), access_share_BT.repeat_interleave(K, dim=1))
        shares.append(share_BE[:, :E])
        documents.append((position_BT == 0).sum(dim=1))
    return RowSums(torch.cat(shares), torch.cat(documents))


def simulate(trace: RoutingTrace, simulation: Simulation) -> Iterator[HitCounts]:
    """Yield the hits of the documents, some rows at a time; several layers are one cache that they share."""
    device, trace = trace.expert_ids[0].device, _where_simulated(trace)
    for rows, ids, E, position_BT in _chunks(trace, by_access=simulation.replay == "access"):
        part = _count_hits(ids, E, position_BT, simulation, whole_rows=_whole_rows(trace))
        yield HitCounts(part.hits.to(device), part.accesses.to(device), (part.rows + rows.start).to(device))


def document_uses(trace: RoutingTrace) -> Iterator[UseCounts]:
    """Yield how often the documents used each expert, some rows at a time, the layers' experts side by side."""
    for rows, ids_BTK, E, position_BT in _chunks(trace):
        rows_D, _, length_D = _documents(position_BT, whole_rows=_whole_rows(trace))
        D, K = len(rows_D), ids_BTK.shape[-1]
        document_BT = (position_BT == 0).flatten().cumsum(dim=0).view_as(position_BT) - 1
        bin_BTK = (document_BT[:, :, None] * E + ids_BTK).masked_fill(position_BT[:, :, None] < 0, D * E)
        uses = torch.zeros(D * E + 1, dtype=torch.int64, device=ids_BTK.device)
        uses.scatter_add_(0, bin_BTK.flatten(), uses.new_ones(()).expand(bin_BTK.numel()))
        yield UseCounts(uses[: D * E].view(D, E), length_D * K, rows_D + rows.start)


def _chunks(trace: RoutingTrace, *, by_access: bool = False) -> Iterator[tuple[slice, Tensor, int, Tensor]]:
    """Yield some rows at a time, their ids [B, T, K] and E with the layers side by side, and positions [B, T].

    By access, each access is a token of its own: T*K tokens of one expert.
    """
    (N, T), experts = trace.shape, [layer.num_experts for layer in trace]
    most = KERNEL_CHUNK_ACCESSES if devices.has_kernels(trace.expert_ids[0]) else CHUNK_ACCESSES
    for rows in row_chunks(N, T * sum(layer.top_k for layer in trace), most):
        ids_BTK = side_by_side([layer[rows] for layer in trace.expert_ids], experts)
        masks = [None if mask is None else mask[rows] for mask in (trace.valid, trace.document_ids)]
        position_BT = document_positions((len(ids_BTK), T), *masks, device=ids_BTK.device)
        if by_access:
            ids_BTK, position_BT = one_by_one(ids_BTK, position_BT)
        yield rows, ids_BTK, sum(experts), position_BT


def one_by_one(expert_ids: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """Return the accesses of tokens as tokens of one expert each, and their positions: [B, T*K, 1] and [B, T*K].

    Example:
        >>> one_by_one(torch.tensor([[[4, 7], [0, 0]]]), torch.tensor([[0, -1]]))
        (tensor([[[4],
                 [7],
                 [0],
                 [0]]]), tensor([[ 0,  1, -1, -1]]))
    """
    B, T, K = expert_ids.shape
    position_BTK = position[:, :, None] * K + torch.arange(K, device=position.device)
    position_BTK = position_BTK.masked_fill(position[:, :, None] < 0, -1)
    return expert_ids.reshape(B, T * K, 1), position_BTK.view(B, T * K)


def _where_simulated(trace: RoutingTrace) -> RoutingTrace:
    """Return the trace on the device that simulates its caches: its own, or the CPU where that has no kernels."""
    if devices.is_on_host(trace.expert_ids[0]) or devices.has_kernels(trace.expert_ids[0]):
        return trace
    ids = [layer.cpu() for layer in trace.expert_ids]
    valid, document_ids = (None if mask is None else mask.cpu() for mask in (trace.valid, trace.document_ids))
    return RoutingTrace(ids, trace.num_experts, valid=valid, document_ids=document_ids)


def _whole_rows(trace: RoutingTrace) -> bool:
    return trace.valid is None and trace.document_ids is None


def _count_hits(ids_BTK: Tensor, E: int, position_BT: Tensor, simulation: Simulation, *, whole_rows: bool) -> HitCounts:
    rows_D, first_D, length_D = _documents(position_BT, whole_rows=whole_rows)
    K = ids_BTK.shape[-1]
    if devices.has_kernels(ids_BTK):
        from consistency_reg.kernels.cache_hits import document_hits

        hits_DE = document_hits(ids_BTK, E, position_BT, len(rows_D), simulation)
    else:
        hits_DE = torch.zeros(len(rows_D), E, dtype=torch.int64, device=ids_BTK.device)
        with torch.inference_mode():  # half the cost of a small operation
            for group in column_groups(length_D, E, K):
                columns = Columns(ids_BTK.flatten(0, 1), E, first_D[group], length_D[group])
                hits_DE[group] = stack_hits(simulation.priorities(columns), cold_hits=simulation.cold == "free")
    return HitCounts(hits_DE, length_D * K, rows_D)


def _documents(position_NT: Tensor, *, whole_rows: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Return row, first token (counted over all rows) and length of each document, in reading order: [D] each.

    Waits for a GPU to learn D, unless every row is one document.
    """
    N, T = position_NT.shape
    if whole_rows:
        rows_D = torch.arange(N if T else 0, device=position_NT.device)
        return rows_D, rows_D * T, torch.full_like(rows_D, T)
    position_S = position_NT.flatten()
    first_D = (position_S == 0).nonzero()[:, 0]
    return first_D // max(T, 1), first_D, position_S[document_ends(position_NT).flatten()] + 1
