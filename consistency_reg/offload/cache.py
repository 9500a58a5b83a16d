"""Keep and evict experts by the rule of a cache policy, access by access.

It is the rule of the simulator with ``replay="token"`` (see :mod:`consistency_reg.functional.cache_hits`): a token's
experts are looked up together against the cache as it was before the token; then each of them in the router's order
becomes resident, and if the cache is over full the resident with the lowest priority other than itself is evicted.
Priorities are those of the one registry of policies, :mod:`consistency_reg.cache_policies`.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from consistency_reg.cache_policies import CACHE_POLICIES, check_policy
from consistency_reg.functional.cache_hits import most_used
from consistency_reg.functional.cache_replay import Residents

LATEST = 2**62  # more than any clock
ENGINE_POLICIES = ("lru", "lfu", "fixed")  # those of the registry that need no future


class Cache(Protocol):
    """Knows the residents of one cache of experts.

    Attributes:
        slots: C.
    """

    slots: int

    def use(self, expert: int) -> int | None:
        """Make an expert resident; return the one that is evicted for it, if any."""

    def __contains__(self, expert: int) -> bool: ...

    def clear(self) -> None:
        """Forget everything."""


class EvictingCache:
    """Evicts by a policy of the registry.

    Args:
        policy: "lru" or "lfu".
        slots: C.

    Example:
        >>> cache = EvictingCache("lfu", slots=2)
        >>> [cache.use(expert) for expert in (0, 0, 1, 2)]
        [None, None, None, 1]
    """

    def __init__(self, policy: str, slots: int) -> None:
        of_access = CACHE_POLICIES[policy].priority
        assert of_access is not None
        self.slots, self._priority = slots, of_access
        self.clear()

    def use(self, expert: int) -> int | None:
        """Give an expert the priority of this access, and evict the lowest other one where there are too many."""
        uses = self._uses.get(expert, 0)
        self._uses[expert] = uses + 1
        values = self._priority(_Access(uses)).values
        self._clock += 1
        self._residents.put(expert, (0 if values is None else int(values)) * LATEST + self._clock)
        return self._residents.evict((expert,)) if len(self._residents) > self.slots else None

    def __contains__(self, expert: int) -> bool:
        return expert in self._residents

    def clear(self) -> None:
        """Forget everything."""
        self._residents = Residents()
        self._uses: dict[int, int] = {}
        self._clock = 0


class FixedCache:
    """Holds the experts that are used most, and never changes.

    Args:
        usage: [E], how often each expert is used.
        slots: C.
        first: number of the first of these experts.
    """

    def __init__(self, usage: Tensor, slots: int, first: int = 0) -> None:
        self.slots = slots
        self._residents = frozenset(first + expert for expert in most_used(usage)[:slots].tolist())

    def use(self, expert: int) -> int | None:
        """Evict nothing: an expert that is not of the set is read for this access alone."""
        return None

    def __contains__(self, expert: int) -> bool:
        return expert in self._residents

    def clear(self) -> None:
        """Forget nothing: the set stays."""


class _Access:
    """Shows one access as the registry's policies see it; a policy that looks ahead finds no future here."""

    tokens = size = LATEST

    def __init__(self, uses: int) -> None:
        self._uses = uses

    def uses_before(self) -> Tensor:
        """Return how often the expert was used before."""
        return torch.tensor(self._uses)

    def next_access(self) -> Tensor:
        """Raise ValueError: an engine does not know it."""
        raise ValueError("the policy needs the next use of an expert, which an engine does not know")


def check_engine_policy(policy: str, usage: Sequence[Tensor] | None, num_experts: Sequence[int]) -> None:
    """Raise ValueError unless an engine can follow the policy, and "fixed" comes with the usage of all experts."""
    check_policy(policy, ENGINE_POLICIES)
    if (policy == "fixed") != (usage is not None):
        raise ValueError("policy='fixed' goes with the usage of every layer's experts: give both or neither")
    if usage is not None and (shapes := [list(counts.shape) for counts in usage]) != [[E] for E in num_experts]:
        raise ValueError(f"usage must be [E] for layers with E = {list(num_experts)}, got shapes {shapes}")


def new_caches(policy: str, slots: Sequence[int], usage: Sequence[Tensor] | None, first: Sequence[int]) -> list[Cache]:
    """Return an empty cache for each layer.

    Args:
        policy: that an engine can follow.
        slots: of each layer.
        usage: for each layer [E], for "fixed".
        first: for each layer the number of its first expert among those of all layers.
    """
    if usage is None:
        return [EvictingCache(policy, number) for number in slots]
    return [FixedCache(*one) for one in zip(usage, slots, first, strict=True)]


def replay(cache: Cache, tokens: Iterable[Iterable[int]]) -> set[int]:
    """Let a cache see the experts of some tokens; return those that were evicted and did not come back."""
    evicted = {cache.use(expert) for experts in tokens for expert in experts}
    return {expert for expert in evicted if expert is not None and expert not in cache}
