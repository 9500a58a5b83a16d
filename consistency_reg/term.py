"""Make a routing loss a training term: its weight at each step, its name, the value to add, the values to log."""

import math
import re
import warnings
from dataclasses import dataclass, replace
from numbers import Real

from torch import Tensor

from consistency_reg.capture import RouterCapture
from consistency_reg.losses import LoadBalanceLoss, LocalConsistencyLoss, RouterAnchorLoss, RouterZLoss, RoutingLoss
from consistency_reg.routing import RoutingTrace
from consistency_reg.session import Listener


@dataclass(frozen=True)
class WeightSchedule:
    """Gives a weight that is 0 before ``start_step``, then rises linearly over ``warmup_steps`` to ``weight``.

    With an ``end_step`` it is 0 from there on, and falls to it linearly over the ``cooldown_steps`` before.

    Raises:
        ValueError: a negative or non-finite weight, a negative number of steps, an end before the warm-up and the
            cool-down are over, a cool-down without an end.

    Example:
        >>> schedule = WeightSchedule(0.3, warmup_steps=100, start_step=50, end_step=500, cooldown_steps=100)
        >>> [schedule.at(step) for step in (0, 100, 200, 450, 500)]
        [0.0, 0.15, 0.3, 0.15, 0.0]
    """

    weight: float
    warmup_steps: int = 0
    start_step: int = 0
    end_step: int | None = None
    cooldown_steps: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", check_weight(self.weight))
        optional = [name for name in ("end_step", "cooldown_steps") if getattr(self, name) is not None]
        for name in ("warmup_steps", "start_step", *optional):
            steps = getattr(self, name)
            if not isinstance(steps, Real) or steps < 0:
                raise ValueError(f"{name} must be >= 0, got {steps!r}")
        if self.end_step is None and self.cooldown_steps:
            raise ValueError(f"cooldown_steps needs an end_step, got cooldown_steps={self.cooldown_steps!r} alone")
        least = self.start_step + self.warmup_steps + (self.cooldown_steps or 0)
        if self.end_step is not None and self.end_step < least:
            raise ValueError(
                f"end_step must be at least start_step + warmup_steps + cooldown_steps = {least}, got {self.end_step!r}"
            )

    def at(self, step: int) -> float:
        """Return the weight at an optimizer step."""
        if step < self.start_step or (self.end_step is not None and step >= self.end_step):
            return 0.0
        risen = (step - self.start_step) / self.warmup_steps if self.warmup_steps else 1.0
        left = (self.end_step - step) / self.cooldown_steps if self.end_step and self.cooldown_steps else 1.0
        return self.weight * min(1.0, risen, left)


@dataclass(frozen=True)
class Term:
    """Holds a weighted term of one forward.

    Attributes:
        weighted: scalar ``weight * mean over layers``, with the graph.
        value: the mean over layers, no graph.
        per_layer: [L] the raw value of every layer, no graph.
        weight: its weight.
    """

    weighted: Tensor
    value: Tensor
    per_layer: Tensor
    weight: float

    @classmethod
    def of(cls, loss: RoutingLoss, trace: RoutingTrace, weight: float) -> "Term":
        """Return the term ``weight * loss(trace)``.

        Raises:
            RuntimeError: the weight is not 0 and the term has no gradient.
        """
        value_L = loss.per_layer(trace)
        value = value_L.mean()
        if weight and not value.requires_grad:
            raise RuntimeError(
                "the consistency term has no gradient: the routers' scores come without a graph (routers and all that "
                "feeds them are frozen, or activation checkpointing is reentrant: use use_reentrant=False)"
            )
        return cls(weight * value, value.detach(), value_L.detach(), weight)

    def detach(self) -> "Term":
        """Return the same term without its graph."""
        return replace(self, weighted=self.weighted.detach())

    def logged(self) -> dict[str, Tensor | float]:
        """Return the values to log: ``loss`` (raw), ``weight``, ``weighted``, ``layer_00``, ..."""
        logged: dict[str, Tensor | float] = {
            "loss": self.value,
            "weight": self.weight,
            "weighted": self.weighted.detach(),
        }
        return logged | {f"layer_{index:02d}": value for index, value in enumerate(self.per_layer)}


def check_weight(weight: float) -> float:
    """Return the weight as a float; ValueError unless it is a finite number >= 0."""
    if not isinstance(weight, Real) or not (math.isfinite(weight) and weight >= 0):
        raise ValueError(f"weight must be a finite number >= 0, got {weight!r}")
    return float(weight)


def check_loss(loss: RoutingLoss | None) -> RoutingLoss:
    """Return the loss, or the usual one for None; TypeError unless it is a routing loss."""
    if loss is None:
        return LocalConsistencyLoss()
    if not isinstance(loss, RoutingLoss):
        raise TypeError(f"loss must be a RoutingLoss, such as LocalConsistencyLoss(), got {loss!r}")
    return loss


NAMES: dict[type[RoutingLoss], str] = {LoadBalanceLoss: "balance", RouterZLoss: "z", RouterAnchorLoss: "anchor"}


def usual_name(loss: RoutingLoss) -> str:
    """Return the name of a term of this loss in logs and checkpoints, where its user gives none.

    Example:
        >>> usual_name(LocalConsistencyLoss()), usual_name(LoadBalanceLoss())
        ('consistency', 'balance')
    """
    return next((name for kind, name in NAMES.items() if isinstance(loss, kind)), "consistency")


def check_name(name: str | None) -> str | None:
    """Return the name of a term; ValueError unless it is None, or letters, digits, dots, dashes and underscores."""
    if name is not None and not (isinstance(name, str) and re.fullmatch(r"[\w.-]+", name)):
        raise ValueError(f"name must be letters, digits, dots, dashes or underscores, got {name!r}")
    return name


def warn_of_frozen(capture: RouterCapture | Listener) -> None:
    """Warn if no router learns: a term on their scores then moves only what feeds them."""
    if not capture.any_router_learns():
        warnings.warn(
            f"all {len(capture.layer_names)} routers are frozen: the consistency term acts on what feeds them alone. "
            "Unfreeze them (with PEFT: modules_to_save or target_parameters that name the router) to train the routing "
            "itself",
            stacklevel=3,
        )
