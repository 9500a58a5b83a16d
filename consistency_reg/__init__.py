"""Train mixture-of-experts language models for local routing consistency.

The core needs torch and torchmetrics. What needs lightning loads on first use and names the extra that is missing.
"""

from importlib import import_module
from importlib.metadata import version
from typing import Any

from consistency_reg import functional
from consistency_reg.capture import RouterAdapter, RouterCapture
from consistency_reg.losses import (
    CacheConsistencyLoss,
    LoadBalanceLoss,
    LocalConsistencyLoss,
    RouterAnchorLoss,
    RouterZLoss,
)
from consistency_reg.metrics import (
    CacheHitRate,
    ExpertSpecialization,
    RoutingBalance,
    SegmentCacheHitRate,
    SegmentRoutingPerformance,
)
from consistency_reg.routing import RoutingTrace

__version__ = version("consistency-reg")

_CALLBACKS = ("ConsistencyRegularizer", "RoutingMonitor")

__all__ = [
    "CacheConsistencyLoss",
    "CacheHitRate",
    "ConsistencyRegularizer",
    "ExpertSpecialization",
    "LoadBalanceLoss",
    "LocalConsistencyLoss",
    "RouterAdapter",
    "RouterAnchorLoss",
    "RouterCapture",
    "RouterZLoss",
    "RoutingBalance",
    "RoutingMonitor",
    "RoutingTrace",
    "SegmentCacheHitRate",
    "SegmentRoutingPerformance",
    "functional",
]


def __getattr__(name: str) -> Any:
    if name in _CALLBACKS:
        return getattr(import_module("consistency_reg.callbacks"), name)
    raise AttributeError(f"module 'consistency_reg' has no attribute {name!r}")
