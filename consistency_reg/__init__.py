"""Train mixture-of-experts language models for local routing consistency.

The core needs torch and torchmetrics. What needs lightning loads on first use and names the extra that is missing; the
metrics load on first use too, as torchmetrics takes along whatever it finds installed.
"""

from importlib import import_module
from importlib.metadata import version
from typing import Any

from consistency_reg import functional, moved
from consistency_reg.capture import RouterAdapter, RouterCapture
from consistency_reg.losses import (
    CacheConsistencyLoss,
    LoadBalanceLoss,
    LocalConsistencyLoss,
    RouterAnchorLoss,
    RouterZLoss,
)
from consistency_reg.rerouting import CacheAwareRouting
from consistency_reg.routing import RoutingTrace

__version__ = version("consistency-reg")
moved.install()

_ON_FIRST_USE = {
    "CacheHitRate": "consistency_reg.metrics",
    "ConsistencyRegularizer": "consistency_reg.callbacks",
    "ExpertSpecialization": "consistency_reg.metrics",
    "OffloadedExperts": "consistency_reg.offload",
    "RoutingBalance": "consistency_reg.metrics",
    "RoutingMonitor": "consistency_reg.callbacks",
    "SegmentCacheHitRate": "consistency_reg.metrics",
    "SegmentRoutingPerformance": "consistency_reg.metrics",
    "attach": "consistency_reg.integrations",
}

__all__ = [
    "CacheAwareRouting",
    "CacheConsistencyLoss",
    "CacheHitRate",
    "ConsistencyRegularizer",
    "ExpertSpecialization",
    "LoadBalanceLoss",
    "LocalConsistencyLoss",
    "OffloadedExperts",
    "RouterAdapter",
    "RouterAnchorLoss",
    "RouterCapture",
    "RouterZLoss",
    "RoutingBalance",
    "RoutingMonitor",
    "RoutingTrace",
    "SegmentCacheHitRate",
    "SegmentRoutingPerformance",
    "attach",
    "functional",
]


def __getattr__(name: str) -> Any:
    if name in _ON_FIRST_USE:
        return getattr(import_module(_ON_FIRST_USE[name]), name)
    raise AttributeError(f"module 'consistency_reg' has no attribute {name!r}")
