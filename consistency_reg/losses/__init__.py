"""Training terms: modules that take a :class:`~consistency_reg.RoutingTrace` and return an unweighted scalar."""

from consistency_reg.losses.balance import LoadBalanceLoss, RouterZLoss
from consistency_reg.losses.base import RoutingLoss
from consistency_reg.losses.consistency import CacheConsistencyLoss, LocalConsistencyLoss

__all__ = ["CacheConsistencyLoss", "LoadBalanceLoss", "LocalConsistencyLoss", "RouterZLoss", "RoutingLoss"]
