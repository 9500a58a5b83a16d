"""Which experts a cache holds after each token: the rule by which the engine keeps and evicts.

The rule is that of the simulator with ``replay="token"`` (see :mod:`consistency_reg.functional.cache`): a token's
experts are looked up together against the cache as it was before the token; then each of them in the router's order
becomes resident, and if the cache is over full the resident with the lowest priority other than itself is evicted.
"""

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from typing import Protocol


class ExpertCache(Protocol):
    """The residents of one cache. Keys are experts, or (layer, expert) where layers share a cache."""

    slots: int

    def use(self, key: Hashable) -> None:
        """Make an expert resident, and evict another one where there are too many."""

    def __contains__(self, key: Hashable) -> bool: ...

    def residents(self) -> list[Hashable]:
        """Return the experts that are resident."""

    def clear(self) -> None:
        """Forget everything."""


class LeastRecentlyUsed:
    """A cache that evicts the expert whose last use is longest ago.

    Args:
        slots: C.

    Example:
        >>> cache = LeastRecentlyUsed(2)
        >>> for expert in (0, 1, 0, 2):
        ...     cache.use(expert)
        >>> cache.residents()
        [0, 2]
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self._order: OrderedDict[Hashable, None] = OrderedDict()

    def use(self, key: Hashable) -> None:
        """Make an expert the most recent, and evict the least recent where there are too many."""
        self._order[key] = None
        self._order.move_to_end(key)
        if len(self._order) > self.slots:
            self._order.popitem(last=False)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._order

    def residents(self) -> list[Hashable]:
        """Return the residents, the least recent first."""
        return list(self._order)

    def clear(self) -> None:
        """Forget everything."""
        self._order.clear()


class LeastFrequentlyUsed:
    """A cache that evicts the expert with the fewest uses since it was cleared, the less recent on ties.

    Args:
        slots: C.

    Example:
        >>> cache = LeastFrequentlyUsed(2)
        >>> for expert in (0, 0, 1, 2):
        ...     cache.use(expert)
        >>> cache.residents()
        [0, 2]
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self._priority: dict[Hashable, tuple[int, int]] = {}  # of all that were used: uses, then when
        self._resident: dict[Hashable, None] = {}
        self._clock = 0

    def use(self, key: Hashable) -> None:
        """Count a use, and evict the expert with the fewest where there are too many."""
        self._clock += 1
        self._priority[key] = (self._priority.get(key, (0, 0))[0] + 1, self._clock)
        self._resident[key] = None
        if len(self._resident) > self.slots:
            del self._resident[min((other for other in self._resident if other != key), key=self._priority.__getitem__)]

    def __contains__(self, key: Hashable) -> bool:
        return key in self._resident

    def residents(self) -> list[Hashable]:
        """Return the residents."""
        return list(self._resident)

    def clear(self) -> None:
        """Forget everything."""
        self._priority.clear()
        self._resident.clear()
        self._clock = 0


POLICIES: dict[str, type[LeastRecentlyUsed] | type[LeastFrequentlyUsed]] = {
    "lru": LeastRecentlyUsed,
    "lfu": LeastFrequentlyUsed,
}


def new_cache(policy: str, slots: int) -> LeastRecentlyUsed | LeastFrequentlyUsed:
    """Return an empty cache.

    Raises:
        ValueError: an unknown policy.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {policy!r}")
    return POLICIES[policy](slots)


def replay(cache: ExpertCache, tokens: Sequence[Iterable[Hashable]]) -> set[Hashable]:
    """Let a cache see the experts of some tokens, and return those that were resident before and are no longer."""
    before = cache.residents()
    for experts in tokens:
        for expert in experts:
            cache.use(expert)
    return {key for key in before if key not in cache}
