"""Goals of a consistency term, in place of its weight: a measure to reach, or a cost to keep to."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from consistency_reg.control.reference_curve import ReferenceCurve
from consistency_reg.measures import SRP, parse
from consistency_reg.measures.reading import SHARE, UP, VALIDATION

SRP_SCALE = 0.15  # a deviation of this much in SRP, or in a hit rate, pushes the weight as much as its starting value


@dataclass(frozen=True)
class Target:
    """Asks that the measure ``name`` is at least ``bound``.

    Args:
        name: ``srp/m16`` (of training batches) or, of validation, a measure for which more is more consistent:
            ``val/srp/m16``, ``val/local_gain/m16``, ``val/cache/lru_25pct`` (a hit rate), ``val/overlap``.
        bound: between 0 and 1.

    Raises:
        ValueError: an unknown name, a bound out of range.

    Example:
        >>> target = Target("srp/m16", 0.7)
        >>> round(target.push(step=0, value=0.6), 3), target.segment_length
        (0.667, 16)
    """

    name: str
    bound: float
    scale: float = SRP_SCALE

    def __post_init__(self) -> None:
        if self.segment_length is None and not self._is_of_validation:
            raise ValueError(
                "target must name srp/m16 (or another segment length), which is measured on training batches, or a "
                f"measure of validation such as val/srp/m16 or val/cache/lru_25pct, got {self.name!r}"
            )
        if not 0 < self.bound < 1:
            raise ValueError(f"target of {self.name} must be a number between 0 and 1, got {self.bound}")
        if self.segment_length is not None and self.segment_length < 2:
            raise ValueError(f"target must have a segment length of at least 2, got {self.name!r}")

    @property
    def segment_length(self) -> int | None:
        """Return the m of an SRP that is measured on training batches; None for a measure of validation."""
        reading = parse(self.name)
        return reading.m if reading is not None and reading == SRP.at(reading.m) else None

    @property
    def _is_of_validation(self) -> bool:
        """Return whether the goal names a share of validation for which more is better."""
        reading = parse(self.name)
        if reading is None or reading.stage != VALIDATION:
            return False
        return reading.measure.better == UP and reading.measure.unit == SHARE

    @property
    def source(self) -> str:
        """Return where the goal is measured: "routing" of training batches, or what "validation" logs."""
        return "routing" if self.segment_length else "validation"

    def is_comparable(self, step: int) -> bool:
        """Return True: a target can be compared at every step."""
        return True

    def push(self, step: int, value: float) -> float:
        """Return how far the value is from the bound; positive below it, where more weight is wanted."""
        return (self.bound - value) / self.scale

    def measured(self, push: float) -> float:
        """Return the value that gave this push."""
        return self.bound - push * self.scale

    def violation(self, push: float) -> float:
        """Return how much is lacking; negative above the bound."""
        return push * self.scale

    def complaint(self, push: float, max_weight: float, steps: int) -> str:
        """Return the message for a weight at its limit that is not enough."""
        return (
            f"the target {self.name}={self.bound:g} is not reached: it is {self.measured(push):.3f} after "
            f"{steps} steps at max_weight={max_weight:g}. Raise max_weight, or ask for less"
        )


@dataclass(frozen=True)
class Budget:
    """Asks that the loss ``name`` is at most ``1 + bound`` times that of another run at the same step.

    The term takes what the budget leaves: its weight rises while there is some left.

    Args:
        name: of a logged loss, such as ``train/ce`` or ``val/ce``.
        bound: the relative increase, > 0.
        reference: the other run, see :meth:`~consistency_reg.control.reference_curve.ReferenceCurve.read`.

    Raises:
        ValueError: a bound out of range.
    """

    name: str
    bound: float
    reference: Path

    def __post_init__(self) -> None:
        if not (math.isfinite(self.bound) and self.bound > 0):
            raise ValueError(
                f"budget of {self.name} must be a relative increase > 0, such as 0.005 for 0.5%, got {self.bound}"
            )

    @cached_property
    def curve(self) -> ReferenceCurve:
        """Return the values of ``name`` in the other run."""
        return ReferenceCurve.read(self.reference, self.name)

    @property
    def scale(self) -> float:
        """Return the bound, which is the whole budget."""
        return self.bound

    @property
    def source(self) -> str:
        """Return which of "training" and "validation" logs the loss."""
        return "validation" if self.name.startswith("val") else "training"

    def is_comparable(self, step: int) -> bool:
        """Return whether the reference says what to expect at a step."""
        return self._expected(step) is not None

    def push(self, step: int, value: float) -> float:
        """Return the share of the budget that is left, for the term to take; negative where it is overspent."""
        expected = self._expected(step)
        if expected is None:
            raise ValueError(f"the reference of {self.name} must have a value at step {step}")
        return 1 - (value / expected - 1) / self.bound

    def measured(self, push: float) -> float:
        """Return the relative increase that gave this push."""
        return self.bound - push * self.scale

    def violation(self, push: float) -> float:
        """Return the increase beyond the budget; negative within it."""
        return -push * self.scale

    def _expected(self, step: int) -> float | None:
        # Batches differ by far more than a budget: training losses compare at the very steps of the reference alone.
        return self.curve.at(step, interpolate=self.source == "validation")

    def complaint(self, push: float, max_weight: float, steps: int) -> str:
        """Return the message for a budget that is overspent without the term."""
        return (
            f"the budget {self.name}={self.bound:g} is overspent with the weight at 0 for {steps} steps: the increase "
            f"over the reference is {self.measured(push):.4f}. Is the reference a run of another recipe or "
            "seed? Or begin the term later, with less weight"
        )


Goal = Target | Budget


def make_goal(
    target: Mapping[str, float] | None, budget: Mapping[str, float] | None, reference: str | Path | None
) -> Goal | None:
    """Return the goal that a user gave as mappings of one entry each; None if there is none.

    Raises:
        ValueError: both or several at once, a budget without a reference or the reverse, what the goals refuse.

    Example:
        >>> make_goal({"srp/m16": 0.7}, None, None)
        Target(name='srp/m16', bound=0.7, scale=0.15)
    """
    if target is not None and budget is not None:
        raise ValueError(f"give either a target or a budget, got target={dict(target)} and budget={dict(budget)}")
    if (budget is None) != (reference is None):
        raise ValueError(
            "a budget is relative to a reference, the run folder, CSV or JSON of a run without the term: give both, "
            f"got budget={budget}, reference={reference}"
        )
    if target is not None:
        return Target(*_only_entry("target", target))
    if budget is None or reference is None:
        return None
    name, bound = _only_entry("budget", budget)
    return Budget("train/ce" if name == "ce" else name, bound, Path(reference))


def _only_entry(what: str, mapping: Mapping[str, float]) -> tuple[str, float]:
    if not isinstance(mapping, Mapping) or len(mapping) != 1:
        raise ValueError(f"{what} must map one name to a number, got {mapping!r}")
    (entry,) = mapping.items()
    if isinstance(entry[1], bool) or not isinstance(entry[1], int | float):
        raise ValueError(f"{what} must map one name to a number, got {mapping!r}")
    return entry
