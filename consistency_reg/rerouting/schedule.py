"""Schedules of cache-aware routing: its strength and its cache at each training step."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

from torch import nn

from consistency_reg.capture import RouterAdapter
from consistency_reg.functional.cache_aware import check_cache_aware
from consistency_reg.masks import Masks
from consistency_reg.rerouting.cache_aware_routing import CacheAwareRouting


@dataclass(frozen=True)
class RoutingSchedule:
    """Cache-aware routing in training: its strength rises from 0, and its cache may be another one at each step.

    The strength is 0 before ``start_step``, then rises linearly over ``ramp_steps`` to ``strength``. What a step has
    depends on its number and the seed alone: a resumed run continues as one that was not stopped, and all processes and
    micro-batches of a step have the same.

    Args:
        strength: of :class:`~consistency_reg.CacheAwareRouting` after the ramp; 0 for none.
        start_step: optimizer step at which the ramp begins.
        ramp_steps: optimizer steps over which the strength rises.
        cache_ratio: slots of each layer's cache in units of its K; or two of them, between which each step draws
            one (uniformly), so that one model serves several devices.
        guaranteed: so many of the router's best experts are always chosen.
        method: "prior", or "max_rank" or "cumulative", whose strengths are not raised in steps smaller than they take.
        seed: of the drawn cache ratios.

    Raises:
        ValueError: a strength that is negative or not a number; a negative number of steps; a cache ratio below 1, or
            two that are not in order.

    Example:
        >>> schedule = RoutingSchedule(0.2, start_step=100, ramp_steps=50)
        >>> [schedule.strength_at(step) for step in (0, 125, 150)]
        [0.0, 0.1, 0.2]
        >>> drawn = [RoutingSchedule(0.2, cache_ratio=(1, 4)).cache_ratio_at(step) for step in range(100)]
        >>> 1 <= min(drawn) < max(drawn) <= 4
        True
    """

    strength: float = 0.1
    start_step: int = 0
    ramp_steps: int = 0
    cache_ratio: float | Sequence[float] = 2.0
    guaranteed: int = 1
    method: str = "prior"
    seed: int = 0

    def __post_init__(self) -> None:
        if not _is_number(self.strength) or self.strength < 0:
            raise ValueError(f"strength must be a finite number of at least 0, got {self.strength!r}")
        check_cache_aware(2, 1, 1, self.strength, 0, self.method)  # the method, and whether it takes this strength
        for name in ("start_step", "ramp_steps"):
            steps = getattr(self, name)
            if not isinstance(steps, Real) or steps < 0:
                raise ValueError(f"{name} must be >= 0, got {steps!r}")
        ratios = self.cache_ratios
        if len(ratios) not in (1, 2) or not all(map(_is_number, ratios)) or not 1 <= ratios[0] <= ratios[-1]:
            raise ValueError(
                "cache_ratio must be a number of at least 1, or the least and the greatest of a range of them, got "
                f"{self.cache_ratio!r}"
            )

    @property
    def cache_ratios(self) -> tuple[float, ...]:
        """Return the one cache ratio, or the least and the greatest."""
        given = self.cache_ratio
        return tuple(given) if isinstance(given, Sequence) and not isinstance(given, str) else (given,)

    def strength_at(self, step: int) -> float:
        """Return the strength of an optimizer step."""
        since = step - self.start_step
        if since < 0 or not self.strength:
            return 0.0
        strength = self.strength * min(1.0, since / self.ramp_steps) if self.ramp_steps else self.strength
        return float(round(strength)) if self.method == "max_rank" else float(strength)

    def cache_ratio_at(self, step: int) -> float:
        """Return the cache ratio of an optimizer step."""
        low, high = self.cache_ratios[0], self.cache_ratios[-1]
        return float(low) if low == high else random.Random(f"{self.seed}/{step}").uniform(low, high)

    def settings(self) -> dict[str, Any]:
        """Return the arguments of :class:`~consistency_reg.CacheAwareRouting` after the ramp, with the least cache."""
        return {
            "cache_ratio": float(self.cache_ratios[0]),
            "strength": float(self.strength),
            "guaranteed": self.guaranteed,
            "method": self.method,
        }

    def deployed(self) -> "RoutingSchedule":
        """Return the routing that the model is deployed with: after the ramp, with the mean of its cache ratios.

        Example:
            >>> deployed = RoutingSchedule(0.2, start_step=100, ramp_steps=50, cache_ratio=(1, 4)).deployed()
            >>> deployed.strength_at(0), deployed.cache_ratio_at(0)
            (0.2, 2.5)
        """
        ratios = self.cache_ratios
        return replace(self, start_step=0, ramp_steps=0, cache_ratio=sum(ratios) / len(ratios))

    def routing(
        self,
        model: nn.Module,
        adapters: Sequence[RouterAdapter] = (),
        masks: Callable[[Mapping[str, Any]], Masks] | None = None,
        layers: str | None = None,
    ) -> CacheAwareRouting:
        """Return the routing of a model, not attached, with the whole strength and the least cache."""
        return CacheAwareRouting(model, **self.settings(), layers=layers, adapters=adapters, masks=masks)

    def begin(self, routing: CacheAwareRouting, step: int) -> None:
        """Give a routing the strength and the cache of an optimizer step; it rests where the strength is 0."""
        routing.strength = self.strength_at(step)
        routing.cache_ratio = self.cache_ratio_at(step)
        routing.active = routing.strength > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and math.isfinite(value)
