"""One pass over a trace that gives the hits of every cache size: cache policies as priority stacks.

A *priority stack* holds the experts that were used so far such that a cache of C slots holds the first C of them. When
x is used, each size that does not hold x evicts the lowest of its residents. So x goes to the top, and the others
follow from a carry that walks down to the old place of x, from ``carry = old[0]`` on:
``new[i] = max(carry, old[i])``, ``carry = min(carry, old[i])``. Source: Mattson, Gecsei, Slutz, Traiger, "Evaluation
techniques for storage hierarchies", IBM Systems Journal 9(2), 1970.

Three things make it fast although one operation on a tensor costs a microsecond:

- documents stand side by side as columns, so that one operation serves hundreds of them;
- an expert is nothing but its key, an integer with its priority, so that a step is one maximum and one minimum;
- the carry of an access is at depth i while that of the next access is at depth i - 1, so all depths work at once,
  each on an access of its own: a wave. Rows of the stack run from the deepest up: the accesses in flight are a slice.

D documents, T tokens of the longest, K experts per token, E experts, Q depths below the top, B accesses of a block.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

STACK_CELLS = 2**15  # columns x depths that are worked on at a time: what a CPU keeps close
COLUMN_ACCESSES = 2**23  # accesses that are laid out at a time: bounds memory for long documents


class Columns:
    """The accesses of D documents side by side.

    Attributes:
        slots: [T', K*D] int64, expert e of column d as ``d*(E+1) + e + 1``, and ``d*(E+1)`` where its document has
            ended. T' leaves room behind the last token for the accesses that are in flight then.
    """

    def __init__(self, token_ids: Tensor, num_experts: int, first: Tensor, length: Tensor) -> None:
        """``token_ids`` is [tokens, K]; document d is the ``length[d]`` tokens of it from ``first[d]`` on."""
        self.T, self.K, self.D, self.E = int(length.max()), token_ids.shape[-1], len(first), num_experts
        self.device = token_ids.device
        self.padded_T = self.T + 2 * block_tokens(self.E, self.K)
        ids_DTK = torch.full((self.D, self.padded_T, self.K), -1, dtype=fitting_dtype(self.E), device=self.device)
        for d, (start, tokens) in enumerate(zip(first.tolist(), length.tolist(), strict=True)):
            ids_DTK[d, :tokens] = token_ids[start : start + tokens]
        expert_0_D = torch.arange(self.D, device=self.device) * (self.E + 1) + 1
        self.slots = torch.empty(self.padded_T, self.K * self.D, dtype=torch.int64, device=self.device)
        torch.add(ids_DTK.permute(1, 2, 0), expert_0_D, out=self.slots.view(self.padded_T, self.K, self.D))

    def no_expert(self, values: Tensor) -> Tensor:
        """The values of the slots that belong to no expert: a view, [D]."""
        return values.view(self.D, self.E + 1)[:, 0]

    def previous_uses(self) -> tuple[Tensor, Tensor]:
        """The clock (1, 2, ... along a column) of the last use of each access' expert before it, or 0: [T, K, D].

        And that of the last use of all of each expert of each column, or 0: [D, E+1].
        """
        dtype = fitting_dtype(self.T * self.K)
        clock_X = torch.arange(1, self.K + 1, dtype=dtype, device=self.device).repeat_interleave(self.D)
        previous = torch.empty(self.T, self.K * self.D, dtype=dtype, device=self.device)
        last = torch.zeros(self.D * (self.E + 1), dtype=dtype, device=self.device)  # by slot
        for slots, out in zip(self.slots.unbind(0), previous.unbind(0), strict=False):
            torch.index_select(last, 0, slots, out=out)
            last.scatter_(0, slots, clock_X)
            clock_X += self.K
        self.no_expert(last).zero_()
        return previous.view(self.T, self.K, self.D), last.view(self.D, self.E + 1)

    def next_uses(self, marks: Sequence[Tensor] | Sequence[int], never: Tensor, out: Tensor) -> Tensor:
        """Write the mark of the next access to the expert of each access of the T tokens to ``out``: [T', K*D].

        Args:
            marks: for each of the T tokens a number or a [K*D] tensor.
            never: [D, E+1], the marks for the last use of each expert.
            out: where to write.

        Returns:
            [D, E+1], the marks of the first uses, and ``never`` where there is none.
        """
        following = never.flatten().clone()
        no_expert = self.no_expert(following)
        for t in range(self.T - 1, -1, -1):
            torch.index_select(following, 0, self.slots[t], out=out[t])
            following.scatter_(0, self.slots[t], marks[t])
            no_expert.copy_(never[:, 0])
        return following.view(self.D, self.E + 1)


class Priorities(ABC):
    """What a policy thinks of each expert, as one integer key: the higher, the longer it stays.

    The keys of a column are distinct, and 0 means no expert.

    Attributes:
        columns: the accesses.
        dtype: of the keys.
        distinct: [D] how many experts each document uses.
    """

    columns: Columns
    dtype: torch.dtype
    distinct: Tensor

    @abstractmethod
    def due_on_top(self) -> Tensor:
        """How often the expert on top of the stack is used again by the next token: [D]."""

    @abstractmethod
    def prepare(self, lag: Tensor, tokens: int) -> None:
        """Get ready to serve blocks of so many tokens; a row of the stack is ``lag`` ([Q, 1]) tokens behind the top."""

    @abstractmethod
    def load(self, first_token: int, old: Tensor, carry: Tensor) -> None:
        """Write the keys of a block of accesses, [B, D] each.

        ``old`` is the key of each access' expert before it; ``carry`` that of the expert that it takes the top from, 0
        where that is the same expert.
        """

    @abstractmethod
    def due(self, keys: Tensor) -> Tensor:
        """1 where the expert of a key is used by the token that its row has reached, one token further at each call.

        [Q, D], as it was before the token. May overwrite ``keys``.
        """

    def mover(self, keys: Tensor, row: int, token: int) -> Callable[[], None] | None:
        """What brings the keys of these rows up to date as they reach their next token; None where keys stay.

        Args:
            keys: [R, D] every K-th row of the stack, from ``row`` on.
            token: of the block at whose step that happens.
        """
        return None


def stack_hits(priorities: Priorities) -> Tensor:
    """Hits of each document with a cache of 1..E slots: [D, E] int64.

    An expert that was used before hits where its depth in the stack is less than the cache size; the n-th expert that
    a document uses for the first time hits where there are n slots or more.
    """
    c = priorities.columns
    reused_DE = torch.zeros(c.D, c.E, dtype=torch.int64, device=c.device)
    reused_DE[:, 0] = priorities.due_on_top()
    deepest = int(priorities.distinct.max()) - 1
    if deepest > 0:
        reused_DE[:, 1 : deepest + 1] = _reused_below_top(priorities, deepest).T
    size_E = torch.arange(1, c.E + 1, device=c.device)
    return reused_DE.cumsum(dim=1) + torch.minimum(size_E, priorities.distinct[:, None])


def _reused_below_top(priorities: Priorities, Q: int) -> Tensor:
    """How often an expert at depth 1, 2, ..., Q is used again: [Q, D]."""
    c, K = priorities.columns, priorities.columns.K
    tokens = block_tokens(Q + 1, K)
    B, in_flight = tokens * K, Q - 1

    def rows(number: int) -> Tensor:
        return torch.zeros(number, c.D, dtype=priorities.dtype, device=c.device)

    stack, other, kept, reached = rows(Q), rows(Q), rows(Q), rows(Q)
    old, carry = rows(in_flight + B), rows(in_flight + B)
    priorities.prepare(torch.arange(Q - 1, -1, -1, device=c.device)[:, None] // K, tokens)
    steps = []
    for step in range(B):
        every_Kth = slice((Q - 1 - step) % K, None, K)  # the rows that a new token has just reached
        move = priorities.mover(stack[every_Kth], every_Kth.start, step // K) if every_Kth.start < Q else None
        in_wave = slice(step, step + Q)
        steps.append((stack, other, old[in_wave], carry[in_wave], stack[every_Kth], reached[every_Kth], move))
        stack, other = other, stack

    reused: Tensor | int = 0
    ne, maximum, minimum = torch.ne, torch.maximum, torch.minimum
    for first_token in range(0, c.T + tokens, tokens):
        for accesses in (old, carry):
            accesses[:in_flight] = accesses[B:].clone()
        priorities.load(first_token, old[in_flight:], carry[in_flight:])
        for token in range(tokens):
            for now, after, own, carried, at_token, reached_rows, move in steps[token * K : token * K + K]:
                if move is not None:
                    move()
                reached_rows.copy_(at_token)
                ne(now, own, out=kept)
                now.mul_(kept)
                maximum(now, carried, out=after)
                minimum(now, carried, out=carried)
            reused = priorities.due(reached) + reused
    assert isinstance(reused, Tensor)
    return reused.flip(0)


def column_groups(length: Tensor, num_experts: int, top_k: int) -> Sequence[Tensor]:
    """Indices of the documents that are worked on together: of similar length, so that columns end together."""
    if len(length) == 0:
        return ()
    longest = int(length.max())
    most = max(1, min(STACK_CELLS // num_experts, COLUMN_ACCESSES // (longest * top_k)))
    return length.argsort(descending=True, stable=True).tensor_split(_ceil_div(len(length), most))


def block_tokens(num_experts: int, top_k: int) -> int:
    """Tokens whose accesses fill the stack from top to bottom; even, as steps go back and forth between two stacks."""
    tokens = _ceil_div(max(num_experts - 1, 1), top_k)
    return tokens + tokens % 2


def fitting_dtype(largest: int, at_least: torch.dtype = torch.int16) -> torch.dtype:
    """The smallest signed integer dtype from ``at_least`` on that holds 0..largest."""
    dtypes = (torch.int16, torch.int32, torch.int64)
    return next(dtype for dtype in dtypes[dtypes.index(at_least) :] if largest <= torch.iinfo(dtype).max)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
