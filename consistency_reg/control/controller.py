"""A controller that finds the weight of a term from what is wanted of it. It knows no trainer, no goal and no model."""

import math
from dataclasses import dataclass, field
from typing import Any

SMOOTHED_OVER = 0.2  # measurements are averaged over this share of the response steps: much noise less, little delay


@dataclass
class WeightController:
    """Moves a factor of a weight between 0 and a limit: up while more of the term is wanted, down while less is.

    Dual ascent: the factor is the multiplier of the constraint that the goal is met, so it integrates by how much it
    is missed. A measure answers a change of weight late, and an integral alone would swing; a part in proportion to
    the present deviation damps that (PI control of a multiplier: arXiv 2007.03964). With the push u, averaged over the
    last steps and cut to -1..1, dt steps after the last measurement::

        lasting += u * (1 - exp(-dt / response_steps))        passing = u * exp(-dt / response_steps)
        factor = lasting + passing, cut to 0..limit

    So it makes no difference to stability whether a measurement comes at every step or every hundred. The lasting part
    is cut to 0..limit too: however long a goal was out of reach, the factor turns back with the first push back.

    Args:
        limit: largest factor; the factor begins at 1.
        response_steps: optimizer steps in which a constant push of 1 moves the lasting part by 0.63. Not shorter than
            the measure takes to answer a change of the weight.

    Raises:
        ValueError: an argument out of range; a push that is not finite, or of an earlier step than the last.

    Example:
        >>> controller = WeightController(limit=3.0, response_steps=100)
        >>> for step in range(0, 200, 10):
        ...     controller.observe(step, push=0.5)
        >>> round(controller.factor, 2)
        2.36
        >>> controller.observe(10_000, push=-2.0)
        >>> round(controller.factor, 2)
        0.9
    """

    limit: float = 3.0
    response_steps: int = 100
    push: float = field(default=0.0, init=False)
    _lasting: float = field(default=1.0, init=False)
    _passing: float = field(default=0.0, init=False)
    _step: int | None = field(default=None, init=False)
    _stuck_since: int | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.limit) and self.limit >= 1):
            raise ValueError(f"limit must be a finite number >= 1, got {self.limit}")
        if self.response_steps < 1:
            raise ValueError(f"response_steps must be at least 1, got {self.response_steps}")

    @property
    def factor(self) -> float:
        """Return the factor that the weight is to be multiplied by, 0..limit."""
        return _clip(self._lasting + self._passing, 0.0, self.limit)

    @property
    def last_step(self) -> int | None:
        """Return the step of the last measurement; None before the first."""
        return self._step

    @property
    def stuck_steps(self) -> int:
        """Return the number of steps for which the factor has been at a limit and pushed against it."""
        return 0 if self._stuck_since is None or self._step is None else self._step - self._stuck_since

    def observe(self, step: int, push: float) -> None:
        """Take a measurement at an optimizer step: positive where more weight is wanted, 1 for a whole scale."""
        if not math.isfinite(push):
            raise ValueError(f"push must be a finite number, got {push} at step {step}")
        if self._step is not None and step < self._step:
            raise ValueError(f"steps must not go back, got {step} after {self._step}")
        since = math.inf if self._step is None else step - self._step
        self.push += _approach(since, SMOOTHED_OVER * self.response_steps) * (push - self.push)
        cut = _clip(self.push, -1.0, 1.0)
        lasting = 0.0 if self._step is None else _approach(since, self.response_steps)
        self._lasting = _clip(self._lasting + cut * lasting, 0.0, self.limit)
        self._passing = cut * (1 - lasting)
        self._step = step
        against_it = (self.factor >= self.limit and cut > 0) or (self.factor <= 0 and cut < 0)
        if not against_it:
            self._stuck_since = None
        elif self._stuck_since is None:
            self._stuck_since = step

    def state_dict(self) -> dict[str, Any]:
        """Return all that :meth:`load_state_dict` needs to resume."""
        return {name: getattr(self, name) for name in ("push", "_lasting", "_passing", "_step", "_stuck_since")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from :meth:`state_dict`; the limit and the response are those of this controller."""
        for name, value in state_dict.items():
            setattr(self, name, value)
        self._lasting = _clip(self._lasting, 0.0, self.limit)


def _approach(steps: float, constant: float) -> float:
    """Return the share of its way that an exponential approach with this constant has gone after some steps."""
    return 1 - math.exp(-steps / constant)


def _clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)
