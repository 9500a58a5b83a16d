"""Priority stacks of cache policies: one pass over a trace gives the hits of every cache size.

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
from functools import cached_property

import torch
from torch import Tensor

STACK_CELLS = 2**15  # columns x depths that are worked on at a time: what a CPU keeps close
COLUMN_ACCESSES = 2**23  # accesses that are laid out at a time: bounds memory for long documents


class Columns:
    """The accesses of D documents side by side: :class:`~consistency_reg.cache_policies.Accesses`.

    Attributes:
        tokens, size: of the columns, with the room behind the last token.
        slots: [T', K*D] int64, expert e of column d as ``d*(E+1) + e + 1``, and ``d*(E+1)`` where its document has
            ended. T' leaves room behind the last token for the accesses that are in flight then.
    """

    def __init__(self, token_ids: Tensor, num_experts: int, first: Tensor, length: Tensor) -> None:
        """Lay out ``token_ids`` [tokens, K]; document d is the ``length[d]`` tokens of it from ``first[d]`` on."""
        self.T, self.K, self.D, self.E = int(length.max()), token_ids.shape[-1], len(first), num_experts
        self.device = token_ids.device
        self.padded_T = self.T + 2 * block_tokens(self.E, self.K)
        self.tokens, self.size = self.padded_T, self.padded_T * self.K
        ids_DTK = torch.full((self.D, self.padded_T, self.K), -1, dtype=fitting_dtype(self.E), device=self.device)
        for d, (start, tokens) in enumerate(zip(first.tolist(), length.tolist(), strict=True)):
            ids_DTK[d, :tokens] = token_ids[start : start + tokens]
        expert_0_D = torch.arange(self.D, device=self.device) * (self.E + 1) + 1
        self.slots = torch.empty(self.padded_T, self.K * self.D, dtype=torch.int64, device=self.device)
        torch.add(ids_DTK.permute(1, 2, 0), expert_0_D, out=self.slots.view(self.padded_T, self.K, self.D))

    def uses_before(self) -> Tensor:
        """Return how often the document used the expert of each access before it: [T', K, D]."""
        dtype = fitting_dtype(self.size)
        uses = torch.zeros(self.padded_T, self.K * self.D, dtype=dtype, device=self.device)
        so_far = torch.zeros(self.D * (self.E + 1), dtype=dtype, device=self.device)  # by slot
        one_use = torch.ones(self.K * self.D, dtype=dtype, device=self.device)
        for slots, out in zip(self.slots[: self.T].unbind(0), uses.unbind(0), strict=False):
            torch.index_select(so_far, 0, slots, out=out)
            so_far.scatter_add_(0, slots, one_use)
        return uses.view(self.padded_T, self.K, self.D)

    def next_access(self) -> Tensor:
        """Return the number of the next access of the column to the expert of each access, or ``size``: [T', K, D]."""
        return self._next_and_first[0]

    @property
    def distinct(self) -> Tensor:
        """[D] how many experts each document uses."""
        return (self._next_and_first[1] < self.size).sum(dim=1)

    @cached_property
    def _next_and_first(self) -> tuple[Tensor, Tensor]:
        """Return each access's next one [T', K, D], and the first access to each expert [D, E]; ``size`` for none."""
        dtype = fitting_dtype(self.size)
        following = torch.full((self.D * (self.E + 1),), self.size, dtype=dtype, device=self.device)  # by slot
        no_expert = following.view(self.D, self.E + 1)[:, 0]
        found = torch.full((self.padded_T, self.K * self.D), self.size, dtype=dtype, device=self.device)
        access_K = torch.arange((self.T - 1) * self.K, self.T * self.K, dtype=dtype, device=self.device)
        access_X = access_K.repeat_interleave(self.D)
        for t in range(self.T - 1, -1, -1):
            torch.index_select(following, 0, self.slots[t], out=found[t])
            following.scatter_(0, self.slots[t], access_X)
            access_X -= self.K
            no_expert.fill_(self.size)
        return found.view(self.padded_T, self.K, self.D), following.view(self.D, self.E + 1)[:, 1:]


class Priorities(ABC):
    """The priority of each expert as one integer key: the higher, the longer it stays.

    The keys of the experts of a column that are used again are distinct, and 0 means no expert.

    Attributes:
        columns: the accesses.
        dtype: of the keys.
    """

    columns: Columns
    dtype: torch.dtype

    @abstractmethod
    def due_on_top(self) -> Tensor:
        """Return how often the expert on top of the stack is used again by the next token: [D]."""

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
        """Return 1 where the expert of a key is used by the token that its row has reached: [Q, D].

        At each call that is one token further; the keys are those before the token, and may be overwritten.
        """

    def mover(self, keys: Tensor, row: int, token: int) -> Callable[[], None] | None:
        """Return what brings the keys of these rows up to date as they reach their next token; None where keys stay.

        Args:
            keys: [R, D] every K-th row of the stack, from ``row`` on.
            token: of the block at whose step that happens.
        """
        return None


def stack_hits(priorities: Priorities, *, cold_hits: bool = True) -> Tensor:
    """Return the hits of each document with a cache of 1..E slots: [D, E] int64.

    An expert that was used before hits where its depth in the stack is less than the cache size; with ``cold_hits`` the
    n-th expert that a document uses for the first time hits where there are n slots or more.
    """
    c = priorities.columns
    distinct_D = c.distinct
    reused_DE = torch.zeros(c.D, c.E, dtype=torch.int64, device=c.device)
    reused_DE[:, 0] = priorities.due_on_top()
    deepest = int(distinct_D.max()) - 1
    if deepest > 0:
        reused_DE[:, 1 : deepest + 1] = _reused_below_top(priorities, deepest).T
    hits_DE = reused_DE.cumsum(dim=1)
    if cold_hits:
        hits_DE += torch.minimum(torch.arange(1, c.E + 1, device=c.device), distinct_D[:, None])
    return hits_DE


def _reused_below_top(priorities: Priorities, Q: int) -> Tensor:
    """Return how often an expert at depth 1, 2, ..., Q is used again: [Q, D]."""
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
    """Return the indices of the documents that are worked on together: of similar length, so that they end together."""
    if len(length) == 0:
        return ()
    longest = int(length.max())
    most = max(1, min(STACK_CELLS // num_experts, COLUMN_ACCESSES // (longest * top_k)))
    return length.argsort(descending=True, stable=True).tensor_split(_ceil_div(len(length), most))


def block_tokens(num_experts: int, top_k: int) -> int:
    """Return the tokens whose accesses fill the stack from top to bottom, an even number.

    Steps go back and forth between two stacks.
    """
    tokens = _ceil_div(max(num_experts - 1, 1), top_k)
    return tokens + tokens % 2


def fitting_dtype(largest: int, at_least: torch.dtype = torch.int16) -> torch.dtype:
    """Return the smallest signed integer dtype from ``at_least`` on that holds 0..largest."""
    dtypes = (torch.int16, torch.int32, torch.int64)
    return next(dtype for dtype in dtypes[dtypes.index(at_least) :] if largest <= torch.iinfo(dtype).max)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
