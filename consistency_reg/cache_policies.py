"""Register the cache policies, which decide which expert stays when a cache is full.

A policy gives each access a priority, which its expert keeps until its next access; ties fall to the more recent use.
The resident with the lowest priority is evicted. That makes it a stack algorithm, so that one pass gives the hits of
every cache size, and one entry here is all that a new policy needs: :mod:`~consistency_reg.functional.stack` simulates
it on a CPU, :mod:`consistency_reg.kernels.cache_hits` on a GPU, and
:mod:`~consistency_reg.functional.cache_replay` access by access.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # labels are read where torch is not needed
    from torch import Tensor


class Accesses(Protocol):
    """Describes the accesses of some documents, each numbered along its row or document, in some layout of tensors.

    Attributes:
        tokens: of the longest.
        size: accesses of the longest; also the number that stands for "never".
    """

    tokens: int
    size: int

    def uses_before(self) -> "Tensor":
        """Return how often the document used the expert of each access before it."""

    def next_access(self) -> "Tensor":
        """Return the number of the next access of the document to the same expert, ``size`` where there is none."""


@dataclass(frozen=True)
class Priority:
    """Holds the priorities of all accesses.

    Attributes:
        values: integers of at least 0, in the layout of the accesses; None where all are 0.
        largest: an upper bound of them.
    """

    values: "Tensor | None"
    largest: int


@dataclass(frozen=True)
class CachePolicy:
    """Holds a cache policy: its name, its label, and which expert it keeps.

    Attributes:
        name: in options and logs.
        label: in tables and pictures.
        priority: of each access; None for a set of experts that never changes.
    """

    name: str
    label: str
    priority: Callable[[Accesses], Priority] | None


def more_recent(accesses: Accesses) -> Priority:
    """Keep the experts that were used last."""
    return Priority(None, 0)


def more_uses(accesses: Accesses) -> Priority:
    """Keep the experts that the document used most often so far."""
    return Priority(accesses.uses_before(), accesses.tokens)


def sooner_use(accesses: Accesses) -> Priority:
    """Keep the experts that are accessed again first; those of one token in the order of its accesses.

    Source of that order: the code of the authors of arXiv 2505.16056.
    """
    return Priority(accesses.size - accesses.next_access(), accesses.size)


CACHE_POLICIES: Mapping[str, CachePolicy] = MappingProxyType(
    {
        policy.name: policy
        for policy in (
            CachePolicy("lru", "LRU", more_recent),
            CachePolicy("lfu", "LFU", more_uses),
            CachePolicy("belady", "Belady", sooner_use),
            CachePolicy("fixed", "fixed set", None),
        )
    }
)
POLICIES = tuple(CACHE_POLICIES)
POLICY_LABELS: Mapping[str, str] = MappingProxyType({name: policy.label for name, policy in CACHE_POLICIES.items()})
EVICTING = tuple(name for name, policy in CACHE_POLICIES.items() if policy.priority is not None)


def check_policy(policy: str, known: tuple[str, ...] = POLICIES) -> None:
    """Raise ValueError unless the policy is one of the known names."""
    if policy not in known:
        raise ValueError(f"policy must be one of {known}, got {policy!r}")
