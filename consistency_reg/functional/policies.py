"""The priorities of real cache policies, see :mod:`~consistency_reg.functional.stack`: LRU, LFU and Belady.

D documents, T tokens of the longest, K experts per token, E experts, Q depths below the top of the stack.
"""

import torch
from torch import Tensor

from consistency_reg.functional.stack import Columns, Priorities, fitting_dtype


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
        self.keys = c.by_slot(0, self.dtype)

        clock_mask = (2**clock_bits - 1) << expert_bits
        self.kept = self._constant((2**bits - 1) & ~clock_mask)
        self.clock_mask, self.clock_shift = self._constant(2**clock_bits - 1), self._constant(expert_bits)
        clock_X = torch.arange(1, c.K + 1, device=device).repeat_interleave(c.D)
        self.served = ((clock_X << expert_bits) + (gain << self.priority_shift)).to(self.dtype)
        self.clock_step = self._constant(c.K << expert_bits)
        self.new = torch.empty(c.K * c.D, dtype=self.dtype, device=device)

        never = c.padded_T
        due_AD = torch.empty(1 + c.padded_T * c.K, c.D, dtype=fitting_dtype(never), device=device)
        due_AD[0] = never
        self.next_token = due_AD[1:].view(c.padded_T, c.K * c.D)
        self.distinct = c.next_uses(range(c.T), never, out=self.next_token)
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
        self.width = torch.tensor(c.D, device=c.device)
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
        self.entry.copy_(keys).mul_(self.width).add_(self.column)
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
        self.dtype = fitting_dtype(c.E + (c.T + 1) * c.K)
        left_T = torch.arange(c.T, 0, -1, device=c.device)  # T - t
        self.old = torch.zeros(c.padded_T * c.K, c.D, dtype=self.dtype, device=c.device)
        torch.add(self._ranks(), self._first_key(left_T)[:, None, None], out=self.old[: c.T * c.K].view(c.T, c.K, c.D))

        # One row late, so that row a is the expert that access a finds on top.
        on_top = torch.zeros(1 + c.padded_T * c.K, c.D, dtype=self.dtype, device=c.device)
        self.on_top, new = on_top[:-1], on_top[1:]
        self.distinct = c.next_uses(self.old.view(c.padded_T, -1).unbind(0), 0, out=new.view(c.padded_T, -1))
        never = new == 0
        new += never.cumsum(dim=0, dtype=self.dtype).clamp_max_(c.E).mul_(never)

        at_token = self.on_top[: c.T * c.K : c.K]
        self.reused_on_top = (at_token >= self._first_key(left_T)[:, None]).sum(dim=0)
        at_token[1:] *= c.slots[: c.T - 1, -c.D :] != c.slots[1 : c.T, : c.D]

    def _ranks(self) -> Tensor:
        """How many of a token's experts were used before each of them: [T, K, D]."""
        previous_TKD = self.columns.previous_uses()
        rank_TKD, before_TKD = torch.zeros_like(previous_TKD), torch.empty_like(previous_TKD)
        for k in range(self.columns.K):
            torch.lt(previous_TKD[:, k : k + 1], previous_TKD, out=before_TKD)
            rank_TKD += before_TKD
        return rank_TKD

    def _first_key(self, tokens_left: Tensor) -> Tensor:
        """The lowest key of an expert that waits for token t, from T - t."""
        return (tokens_left * self.columns.K + self.columns.E).to(self.dtype)

    def due_on_top(self) -> Tensor:
        return self.reused_on_top

    def prepare(self, lag: Tensor, tokens: int) -> None:
        self.tokens_left = lag + self.columns.T

    def load(self, first_token: int, old: Tensor, carry: Tensor) -> None:
        block = slice(first_token * self.columns.K, first_token * self.columns.K + len(old))
        old.copy_(self.old[block])
        carry.copy_(self.on_top[block])

    def due(self, keys: Tensor) -> Tensor:
        keys.ge_(self._first_key(self.tokens_left.clamp(1, self.columns.T + 1)))
        self.tokens_left -= 1
        return keys
