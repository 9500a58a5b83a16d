"""Lightning callbacks: terms on the routing, cache-aware routing in training, and measures and pictures of both."""

from consistency_reg.callbacks.agreement import ExpertAgreement
from consistency_reg.callbacks.anchor import RouterAnchor
from consistency_reg.callbacks.cache_aware import CacheAwareTraining
from consistency_reg.callbacks.monitor import RoutingMonitor
from consistency_reg.callbacks.regularizer import ConsistencyRegularizer
from consistency_reg.callbacks.trainer_state import domain_names
from consistency_reg.masks import batch_masks

__all__ = [
    "CacheAwareTraining",
    "ConsistencyRegularizer",
    "ExpertAgreement",
    "RouterAnchor",
    "RoutingMonitor",
    "batch_masks",
    "domain_names",
]
