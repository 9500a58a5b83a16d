"""The priorities of cache policies, see :mod:`~consistency_reg.functional.stack`: LRU, LFU, Belady, and that of SCH.

D documents, T tokens of the longest, K experts per token, E experts, Q depths below the top of the stack, m segment
length.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from consistency_reg.functional.stack import Columns, Priorities, fitting_dtype


def priorities_of(policy: str, columns: Columns, segment_length: int) -> Priorities:
    """The priorities of "lru", "lfu", "belady", or of "sch" with windows of m tokens."""
    if policy == "sch":
        return WindowUses(columns, segment_length)
    return {"lru": lru, "lfu": lfu, "belady": Belady}[policy](columns)


class ClockedPriorities(Priorities):
    """Keys of a priority, then the clock of the last access (ties fall to the more recent use), then the expert.

    An access changes the priority of its expert by ``gain``. LRU has no priority; LFU has the uses so far, gain 1.
    """

    def __init__(self, columns: Columns, *, priority_bits: int, gain: int, expert_bits: int = 0) -> None:
        self.columns = columns
        c, device = columns, columns.device
        clock_bits = (c.padded_T * c.K).bit_length()
        self.expert_bits, self.priority_shift = expert_bits, clock_bits + expert_bits
        bits = priority_bits + self.priority_shift
        self.dtype = fitting_dtype(2**bits - 1, at_least=torch.int32 if expert_bits else torch.int16)
        self.keys = torch.zeros(c.D * (c.E + 1), dtype=self.dtype, device=device)  # by slot

        clock_mask = (2**clock_bits - 1) << expert_bits
        self.kept = self._constant((2**bits - 1) & ~clock_mask)
        self.clock_mask, self.clock_shift = self._constant(2**clock_bits - 1), self._constant(expert_bits)
        clock_X = torch.arange(1, c.K + 1, device=device).repeat_interleave(c.D)
        self.served = ((clock_X << expert_bits) + (gain << self.priority_shift)).to(self.dtype)
        self.clock_step = self._constant(c.K << expert_bits)
        self.new = torch.empty(c.K * c.D, dtype=self.dtype, device=device)

        never = c.padded_T
        due_AD = torch.full((1 + c.padded_T * c.K, c.D), never, dtype=fitting_dtype(never), device=device)
        self.next_token = due_AD[1:].view(c.padded_T, c.K * c.D)
        first_token = c.next_uses(range(c.T), due_AD.new_full((c.D, c.E + 1), never), out=self.next_token)
        self.distinct = (first_token[:, 1:] < never).sum(dim=1)
        self.due_by_clock = due_AD.flatten()

    def _constant(self, value: int) -> Tensor:
        return torch.tensor(value, dtype=self.dtype, device=self.columns.device)

    def due_on_top(self) -> Tensor:
        c = self.columns
        last_of_token = self.next_token.view(c.padded_T, c.K, c.D)[: c.T - 1, -1]
        return (last_of_token == torch.arange(1, c.T, device=c.device)[:, None]).sum(dim=0)

    def prepare(self, lag: Tensor, tokens: int) -> None:
        c, Q = self.columns, len(lag)
        self.token = (-lag).to(self.next_token.dtype)
        self.entry = torch.empty(Q, c.D, dtype=fitting_dtype(len(self.due_by_clock), torch.int32), device=c.device)
        self.column = torch.arange(c.D, dtype=self.entry.dtype, device=c.device)
        self.due_token = torch.empty(Q, c.D, dtype=self.token.dtype, device=c.device)

    def load(self, first_token: int, old: Tensor, carry: Tensor) -> None:
        c = self.columns
        for i, (old_X, carry_KD) in enumerate(zip(old.split(c.K), carry.split(c.K), strict=True)):
            t = first_token + i
            self.before(t)
            torch.index_select(self.keys, 0, c.slots[t], out=old_X.view(-1))
            if t > 0:
                on_top = c.slots[t - 1, -c.D :]
                torch.index_select(self.keys, 0, on_top, out=carry_KD[0]).mul_(on_top != c.slots[t, : c.D])
            torch.bitwise_and(old_X.view(-1), self.kept, out=self.new).add_(self.served)
            self.served.add_(self.clock_step)
            self.keys.scatter_(0, c.slots[t], self.new)
            carry_KD[1:] = self.new.view(c.K, c.D)[:-1]

    def before(self, t: int) -> None:
        """Change keys as token t comes, before it is served."""

    def due(self, keys: Tensor) -> Tensor:
        if self.expert_bits:
            torch.bitwise_right_shift(keys, self.clock_shift, out=keys)
        torch.bitwise_and(keys, self.clock_mask, out=keys)
        torch.add(self.column, keys, alpha=self.columns.D, out=self.entry)
        torch.index_select(self.due_by_clock, 0, self.entry.view(-1), out=self.due_token.view(-1))
        self.due_token.eq_(self.token)
        self.token.add_(1)
        return self.due_token


def lru(columns: Columns) -> Priorities:
    """The more recent use stays longer."""
    return ClockedPriorities(columns, priority_bits=0, gain=0)


def lfu(columns: Columns) -> Priorities:
    """The expert with more uses so far stays longer; ties fall to the more recent use."""
    return ClockedPriorities(columns, priority_bits=columns.padded_T.bit_length(), gain=1)


class Belady(Priorities):
    """The expert that is used sooner stays longer; ties, of one token or of never, fall to the more recent use.

    An expert that waits for token t has one of the K keys from ``E + (T - t) * K`` on, by the recency of its last use
    among those that wait for t; the n-th one that is never used again has the key n. So keys are small, and known
    before the cache is simulated.
    """

    def __init__(self, columns: Columns) -> None:
        self.columns = c = columns
        self.dtype = fitting_dtype(c.E + (c.padded_T + 1) * c.K)
        previous_TKD, last_DE = c.previous_uses()
        self.distinct = (last_DE > 0).sum(dim=1)

        left_T = torch.arange(c.T, 0, -1, device=c.device)  # T - t
        self.old = torch.zeros(c.padded_T * c.K, c.D, dtype=self.dtype, device=c.device)
        old_TKD = self.old[: c.T * c.K].view(c.T, c.K, c.D)
        torch.add(_ranks(previous_TKD), self._first_key(left_T)[:, None, None], out=old_TKD)
        # One row late, so that row a is the expert that access a finds on top.
        on_top = torch.zeros(1 + c.padded_T * c.K, c.D, dtype=self.dtype, device=c.device)
        self.on_top, new_TX = on_top[:-1], on_top[1:].view(c.padded_T, c.K * c.D)
        by_recency_DE = last_DE.argsort(dim=1).argsort(dim=1).to(self.dtype)
        c.next_uses(old_TKD.flatten(1).unbind(0), by_recency_DE, out=new_TX)

        at_token = self.on_top[: c.T * c.K : c.K]
        self.reused_on_top = (at_token >= self._first_key(left_T)[:, None]).sum(dim=0)
        at_token[1:] *= c.slots[: c.T - 1, -c.D :] != c.slots[1 : c.T, : c.D]

    def _first_key(self, tokens_left: Tensor) -> Tensor:
        """The lowest key of an expert that waits for token t, from T - t."""
        return (tokens_left * self.columns.K + self.columns.E).to(self.dtype)

    def due_on_top(self) -> Tensor:
        return self.reused_on_top

    def prepare(self, lag: Tensor, tokens: int) -> None:
        self.due_from = self._first_key(lag + self.columns.T)

    def load(self, first_token: int, old: Tensor, carry: Tensor) -> None:
        block = slice(first_token * self.columns.K, first_token * self.columns.K + len(old))
        old.copy_(self.old[block])
        carry.copy_(self.on_top[block])

    def due(self, keys: Tensor) -> Tensor:
        keys.ge_(self.due_from)
        nothing_is_due_from = self.columns.E + self.columns.K  # behind the last token
        self.due_from.sub_(self.columns.K).clamp_min_(nothing_is_due_from)
        return keys


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


def _ranks(previous_TKD: Tensor) -> Tensor:
    """How many of the experts of a token were used before each of them: [T, K, D]."""
    rank_TKD, before_TKD = torch.zeros_like(previous_TKD), torch.empty_like(previous_TKD)
    for k in range(previous_TKD.shape[1]):
        torch.lt(previous_TKD[:, k : k + 1], previous_TKD, out=before_TKD)
        rank_TKD += before_TKD
    return rank_TKD
