"""Segment cache best hit rate (SCH): the hit rate of a cache that knows how often each expert is used soon.

Source: arXiv 2505.16056. The cache of :mod:`~consistency_reg.functional.cache`, with this priority: the uses in the
window of m tokens that starts at the present token and that are not served yet; ties fall to the more recent use.

N rows, T tokens of the longest document, K active of E routed experts, D documents, m segment length, Q depths below
the top of the stack.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from consistency_reg.functional.cache import HitCounts, count_hits, mean_hit_rate, one_cache
from consistency_reg.functional.policies import ClockedPriorities
from consistency_reg.functional.srp import check_segment_lengths
from consistency_reg.functional.stack import Columns


def sch(
    expert_ids: Tensor | Sequence[Tensor],
    num_experts: int | Sequence[int],
    segment_length: int,
    valid: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> Tensor:
    """SCH of one layer for every cache size, the mean over documents of equal weight.

    Args:
        expert_ids: [N, T, K] int64, one layer; or a list with one for each layer, for one cache that all layers share
            (the accesses of a token are those of the first layer, then those of the second, ...): the SCH of a model.
        num_experts: E; one for all layers or one for each.
        segment_length: m in tokens.
        valid: [N, T] bool, True for real tokens; all when None.
        document_ids: [N, T] integers; one document a row when None.

    Returns:
        [E] float64, the hit rate with a cache of 1, 2, ..., E slots (the sum of E for a list of layers).

    Raises:
        TypeError: ids that are not int64, masks of a wrong dtype.
        ValueError: shapes that do not match, K > E, ids out of range or repeated within a token, m < 1, no valid token.

    Example:
        >>> ids = torch.tensor([[[0, 1], [0, 2], [0, 1], [0, 2]]])
        >>> sch(ids, 3, segment_length=3)
        tensor([0.1250, 0.6250, 1.0000], dtype=torch.float64)
    """
    ids, E = one_cache(expert_ids, num_experts, valid, document_ids)
    return mean_hit_rate(sch_counts(ids, E, segment_length, valid, document_ids))


def sch_counts(
    expert_ids: Tensor,
    num_experts: int,
    segment_length: int,
    valid: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> HitCounts:
    """The hits of each document, see :func:`sch`. Ids are not checked, only their shape.

    Layers of equal E and K may stand below each other as more rows: they are simulated at once.

    Example:
        >>> sch_counts(torch.tensor([[[0], [1], [0]]]), 2, segment_length=2).hits.tolist()
        [[1, 3]]
    """
    if isinstance(segment_length, Sequence):
        raise TypeError(f"segment_length must be one integer number of tokens, got {segment_length!r}")
    check_segment_lengths(segment_length)
    priorities = partial(WindowUses, segment_length=segment_length)
    return count_hits(expert_ids, num_experts, priorities, valid, document_ids)


class WindowUses(ClockedPriorities):
    """Uses in the window of m tokens from the present one on, not served yet; then the more recent use.

    As token t comes, the window takes in the experts of token t + m - 1, so keys change in the middle of the stack:
    rows that a new token reaches look up by their expert what came in.
    """

    def __init__(self, columns: Columns, segment_length: int) -> None:
        c, self.m = columns, segment_length
        super().__init__(c, priority_bits=min(self.m, c.T).bit_length(), gain=-1, expert_bits=c.E.bit_length())
        self.one_use = torch.full((c.K * c.D,), 1 << self.priority_shift, dtype=self.dtype, device=c.device)
        self.keys.view(c.D, c.E + 1).copy_(torch.arange(c.E + 1, device=c.device))
        for t in range(min(self.m - 1, c.T)):
            self.keys.scatter_add_(0, c.slots[t], self.one_use)

    def before(self, t: int) -> None:
        entering = t + self.m - 1
        if entering < self.columns.T:
            self.keys.scatter_add_(0, self.columns.slots[entering], self.one_use)

    def prepare(self, lag: Tensor, tokens: int) -> None:
        super().prepare(lag, tokens)
        c = self.columns
        self.lag = lag
        # What comes in by slot, for the tokens of the last block and of this one: rows may be one block behind the top.
        self.incoming = torch.zeros(2 * tokens, c.D * (c.E + 1), dtype=self.dtype, device=c.device)
        R = -(-len(lag) // c.K)
        row_R, column_D = torch.arange(R, device=c.device), torch.arange(c.D, device=c.device)
        self.slot_base = (row_R[:, None] * c.D * (c.E + 1) + column_D * (c.E + 1)).to(self.dtype)
        self.slot, self.gained = torch.empty_like(self.slot_base), torch.empty_like(self.slot_base)
        self.expert_mask = self._constant((1 << self.expert_bits) - 1)

    def load(self, first_token: int, old: Tensor, carry: Tensor) -> None:
        c = self.columns
        before, now = self.incoming.chunk(2)
        before.copy_(now)
        now.zero_()
        entering = c.slots[first_token + self.m - 1 : min(first_token + self.m - 1 + len(now), c.T)]
        if len(entering):
            slot = entering + torch.arange(len(entering), device=c.device)[:, None] * now.shape[1]
            now.view(-1).scatter_add_(0, slot.flatten(), self.one_use[:1].expand(slot.numel()))
            now.view(len(now), c.D, c.E + 1)[:, :, 0] = 0
        super().load(first_token, old, carry)

    def mover(self, keys: Tensor, row: int, token: int) -> Callable[[], None] | None:
        R = len(keys)
        first = len(self.incoming) // 2 + token - int(self.lag[row])
        incoming = self.incoming[first:].view(-1)
        slot_base, slot, gained = self.slot_base[:R], self.slot[:R], self.gained[:R]
        flat_slot, flat_gained, expert_mask = slot.view(-1), gained.view(-1), self.expert_mask

        def move() -> None:
            torch.bitwise_and(keys, expert_mask, out=slot).add_(slot_base)
            torch.index_select(incoming, 0, flat_slot, out=flat_gained)
            keys.add_(gained)

        return move
