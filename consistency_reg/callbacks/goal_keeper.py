"""Take from a trainer the measurements that the controller of a weight works with."""

from typing import Any

from consistency_reg.control import Budget, Goal, Target, WeightController
from consistency_reg.metrics import SegmentRoutingPerformance
from consistency_reg.optional import require
from consistency_reg.routing import RoutingTrace

with require("lightning"):
    from lightning.pytorch import Trainer
    from lightning.pytorch.utilities.rank_zero import rank_zero_warn

MEASUREMENTS = 20  # of the routing of training batches in the response steps
PATIENCE = 2  # times the response steps at the limit, and the goal cannot be met
MISSED = 0.1  # times the goal's scale: less than that is noise


class GoalKeeper:
    """Moves the weight of a term so that a goal is kept; a thin adapter over :class:`WeightController`.

    Args:
        goal: what is wanted.
        weight: where the weight begins, > 0.
        max_weight: its limit; three times ``weight`` when None.
        response_steps: of the controller.
        first_step: optimizer step from which on the goal counts.

    Raises:
        ValueError: a weight of 0, or a limit below it.
    """

    def __init__(
        self, goal: Goal, weight: float, *, max_weight: float | None, response_steps: int, first_step: int
    ) -> None:
        if weight == 0:
            raise ValueError("weight must be > 0 with a target or a budget, as that is where it begins, got 0")
        self.max_weight = 3 * weight if max_weight is None else max_weight
        if not weight <= self.max_weight < float("inf"):
            raise ValueError(f"max_weight must be a finite number of at least weight={weight:g}, got {max_weight}")
        self.goal = goal
        self.first_step = first_step
        self.controller = WeightController(self.max_weight / weight, response_steps)
        self._complained = False

    @property
    def factor(self) -> float:
        """Return what the weight is to be multiplied by."""
        return self.controller.factor

    def on_fit_start(self) -> None:
        """Read the curve of the run that a budget is relative to."""
        if isinstance(self.goal, Budget):
            _ = self.goal.curve

    def on_train_start(self, step: int) -> None:
        """Begin anew where this is not the continuation of what was measured before."""
        if self.controller.last_step is not None and self.controller.last_step >= step:
            self.controller = WeightController(self.controller.limit, self.controller.response_steps)
            self._complained = False

    def on_training_trace(self, step: int, trace: RoutingTrace) -> None:
        """Measure the routing of a training batch now and then, as the monitor does on validation.

        Over all processes; of the micro-batches of a step the first.
        """
        every = max(1, self.controller.response_steps // MEASUREMENTS)
        m = self.goal.segment_length if isinstance(self.goal, Target) else None
        if m is None or step % every or not self._is_due(step):
            return
        metric = SegmentRoutingPerformance.from_trace(trace, [m])
        metric.update(trace)
        value = float(metric.compute()[f"srp_m{m}"])
        if value > 0:  # 0 is the SRP of a batch without a single window of m tokens
            self._observe(step, value)

    def on_logged(self, trainer: Trainer, source: str) -> None:
        """Read the measure where it is logged: after a training batch ("training") or after "validation"."""
        step = trainer.global_step - 1  # as loggers count
        if self.goal.source != source or not self._is_due(step) or not self.goal.is_comparable(step):
            return
        value = trainer.callback_metrics.get(self.goal.name)
        if value is None:
            logged = ", ".join(sorted(trainer.callback_metrics)) or "nothing"
            raise RuntimeError(f"the weight is to follow {self.goal.name}, which must be logged, got {logged}")
        self._observe(step, float(trainer.strategy.reduce(value.detach().clone(), reduce_op="mean")))

    def on_fit_end(self) -> None:
        """Warn if the measure of the goal was never logged."""
        if self.controller.last_step is None:
            rank_zero_warn(
                f"{self.goal.name} was not measured once from step {self.first_step} on, so the weight stayed where it "
                "began: does the run validate, has the reference the same steps, are the documents long enough?"
            )

    def logged(self) -> dict[str, float]:
        """Return what is logged next to the weight: the goal, the smoothed measurement, and how much is missing."""
        if self.controller.last_step is None:
            return {}
        push = self.controller.push
        return {
            "target": self.goal.bound,
            "measured": self.goal.measured(push),
            "violation": self.goal.violation(push),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return all that :meth:`load_state_dict` needs to resume."""
        return {"controller": self.controller.state_dict(), "complained": self._complained}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from :meth:`state_dict`."""
        self.controller.load_state_dict(state_dict["controller"])
        self._complained = state_dict["complained"]

    def _is_due(self, step: int) -> bool:
        """Return whether the goal counts by now, and the step has not been measured already."""
        last = self.controller.last_step
        return step >= self.first_step and (last is None or step > last)

    def _observe(self, step: int, value: float) -> None:
        self.controller.observe(step, self.goal.push(step, value))
        stuck, push = self.controller.stuck_steps, self.controller.push
        missed = self.goal.violation(push) > MISSED * self.goal.scale
        if missed and not self._complained and stuck >= PATIENCE * self.controller.response_steps:
            self._complained = True
            rank_zero_warn(self.goal.complaint(push, self.max_weight, stuck))
