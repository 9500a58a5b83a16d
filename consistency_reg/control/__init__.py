"""The weight of a term from what is wanted of it: goals, the controller that keeps them, the run that a cost is of."""

from consistency_reg.control.controller import WeightController
from consistency_reg.control.goals import Budget, Goal, Target, make_goal
from consistency_reg.control.reference_curve import ReferenceCurve

__all__ = ["Budget", "Goal", "ReferenceCurve", "Target", "WeightController", "make_goal"]
