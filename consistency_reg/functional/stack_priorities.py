"""The keys of :mod:`~consistency_reg.functional.stack`: those of a cache policy, and those of SCH.

D documents, T tokens of the longest, K experts per token, E experts, Q depths below the top of the stack, m segment
length.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from consistency_reg.cache_policies import CachePolicy
from consistency_reg.functional.stack import Columns, Priorities, fitting_dtype


class ClockedPriorities(Priorities):
    """Keys of a priority, then the clock of the last access (ties fall to the more recent use), then the expert.

    The clock says which access gave the key, and so which token uses the expert next.
    """

    def __init__(self, columns: Columns, *, priority_bits: int, expert_bits: int = 0) -> None:
        self.columns = c = columns
        clock_bits = c.size.bit_length()
        self.expert_bits, self.priority_shift = expert_bits, clock_bits + expert_bits
        self.bits = priority_bits + self.priority_shift
        self.dtype = fitting_dtype(2**self.bits - 1, at_least=torch.int32 if expert_bits else torch.int16)
        self.clock_mask, self.clock_shift = self._constant(2**clock_bits - 1), self._constant(expert_bits)
        due_AD = torch.full((1 + c.size, c.D), c.padded_T, dtype=fitting_dtype(c.padded_T), device=c.device)
        self.next_token = due_AD[1:].view(c.padded_T, c.K, c.D)
        self.next_token.copy_(c.next_access().div(c.K, rounding_mode="floor"))
        self.due_by_clock = due_AD.flatten()

    def _constant(self, value: int) -> Tensor:
        return torch.tensor(value, dtype=self.dtype, device=self.columns.device)

    def due_on_top(self) -> Tensor:
        """Return how often the expert on top of the stack is used again by the next token: [D]."""
        c = self.columns
        last_of_token = self.next_token[: c.T - 1, -1]
        return (last_of_token == torch.arange(1, c.T, device=c.device)[:, None]).sum(dim=0)

    def prepare(self, lag: Tensor, tokens: int) -> None:
        """Get ready to serve blocks of so many tokens."""
        c, Q = self.columns, len(lag)
        self.token = (-lag).to(self.next_token.dtype)
        self.entry = torch.empty(Q, c.D, dtype=fitting_dtype(len(self.due_by_clock), torch.int32), device=c.device)
        self.column = torch.arange(c.D, dtype=self.entry.dtype, device=c.device)
        self.due_token = torch.empty(Q, c.D, dtype=self.token.dtype, device=c.device)

    def due(self, keys: Tensor) -> Tensor:
        """Return 1 where the expert of a key is used by the token that its row has reached: [Q, D]."""
        if self.expert_bits:
            torch.bitwise_right_shift(keys, self.clock_shift, out=keys)
        torch.bitwise_and(keys, self.clock_mask, out=keys)
        torch.add(self.column, keys, alpha=self.columns.D, out=self.entry)
        torch.index_select(self.due_by_clock, 0, self.entry.view(-1), out=self.due_token.view(-1))
        self.due_token.eq_(self.token)
        self.token.add_(1)
        return self.due_token


class PolicyPriorities(ClockedPriorities):
    """The priorities of a cache policy: an expert keeps that of its last access, so all keys are known beforehand."""

    def __init__(self, columns: Columns, policy: CachePolicy) -> None:
        assert policy.priority is not None
        c, priority = columns, policy.priority(columns)
        super().__init__(c, priority_bits=priority.largest.bit_length())
        # One row late, so that row a is the key of the expert that access a finds on top.
        on_top = torch.zeros(1 + c.size, c.D, dtype=self.dtype, device=c.device)
        self.on_top, new_AD = on_top[:-1], on_top[1:]
        if priority.values is not None:
            new_AD.copy_(priority.values.reshape(c.size, c.D)).mul_(1 << self.priority_shift)
        new_AD += torch.arange(1, c.size + 1, dtype=self.dtype, device=c.device)[:, None]

        self.old = torch.zeros(c.size, c.D, dtype=self.dtype, device=c.device)
        keys = torch.zeros(c.D * (c.E + 1), dtype=self.dtype, device=c.device)  # by slot
        rows = (values.view(c.padded_T, -1)[: c.T].unbind(0) for values in (c.slots, self.old, new_AD))
        for slots, old, new in zip(*rows, strict=True):
            torch.index_select(keys, 0, slots, out=old)
            keys.scatter_(0, slots, new)
        is_other = c.slots[: c.T - 1, -c.D :] != c.slots[1 : c.T, : c.D]
        self.on_top[c.K : c.T * c.K : c.K] *= is_other

    def load(self, first_token: int, old: Tensor, carry: Tensor) -> None:
        """Write the keys of a block of accesses."""
        block = slice(first_token * self.columns.K, first_token * self.columns.K + len(old))
        old.copy_(self.old[block])
        carry.copy_(self.on_top[block])


class WindowUses(ClockedPriorities):
    """Uses in the window of m tokens from the present one on, not served yet; then the more recent use.

    As token t comes, the window takes in the experts of token t + m - 1, so keys change in the middle of the stack:
    rows that a new token reaches look up by their expert what came in.
    """

    def __init__(self, columns: Columns, segment_length: int) -> None:
        c, self.m = columns, segment_length
        super().__init__(c, priority_bits=min(self.m, c.T).bit_length(), expert_bits=c.E.bit_length())
        clock_mask = int(self.clock_mask) << self.expert_bits
        self.kept = self._constant((2**self.bits - 1) & ~clock_mask)
        clock_X = torch.arange(1, c.K + 1, device=c.device).repeat_interleave(c.D)
        self.served = ((clock_X << self.expert_bits) - (1 << self.priority_shift)).to(self.dtype)
        self.clock_step = self._constant(c.K << self.expert_bits)
        self.new = torch.empty(c.K * c.D, dtype=self.dtype, device=c.device)
        self.one_use = torch.full((c.K * c.D,), 1 << self.priority_shift, dtype=self.dtype, device=c.device)
        self.keys = torch.arange(c.E + 1, dtype=self.dtype, device=c.device).repeat(c.D)  # by slot
        for t in range(min(self.m - 1, c.T)):
            self.keys.scatter_add_(0, c.slots[t], self.one_use)

    def prepare(self, lag: Tensor, tokens: int) -> None:
        """Get ready to serve blocks of so many tokens."""
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
        """Write the keys of a block of accesses."""
        c = self.columns
        self._load_incoming(first_token)
        for i, (old_X, carry_KD) in enumerate(zip(old.split(c.K), carry.split(c.K), strict=True)):
            t = first_token + i
            if t + self.m - 1 < c.T:
                self.keys.scatter_add_(0, c.slots[t + self.m - 1], self.one_use)
            torch.index_select(self.keys, 0, c.slots[t], out=old_X.view(-1))
            if t > 0:
                on_top = c.slots[t - 1, -c.D :]
                torch.index_select(self.keys, 0, on_top, out=carry_KD[0]).mul_(on_top != c.slots[t, : c.D])
            torch.bitwise_and(old_X.view(-1), self.kept, out=self.new).add_(self.served)
            self.served.add_(self.clock_step)
            self.keys.scatter_(0, c.slots[t], self.new)
            carry_KD[1:] = self.new.view(c.K, c.D)[:-1]

    def _load_incoming(self, first_token: int) -> None:
        """Note what comes into the window with each token of a block."""
        c = self.columns
        before, now = self.incoming.chunk(2)
        before.copy_(now)
        now.zero_()
        entering = c.slots[first_token + self.m - 1 : min(first_token + self.m - 1 + len(now), c.T)]
        if len(entering):
            slot = entering + torch.arange(len(entering), device=c.device)[:, None] * now.shape[1]
            now.view(-1).scatter_add_(0, slot.flatten(), self.one_use[:1].expand(slot.numel()))
            now.view(len(now), c.D, c.E + 1)[:, :, 0] = 0

    def mover(self, keys: Tensor, row: int, token: int) -> Callable[[], None] | None:
        """Return what adds to the keys of these rows the uses that came into the window."""
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
