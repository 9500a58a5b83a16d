"""Train mixture-of-experts language models for local routing consistency.

The core needs torch and torchmetrics. Every name loads on first use, so that the command's help comes at once; what
needs lightning names the extra that is missing.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from consistency_reg import moved

if TYPE_CHECKING:
    from consistency_reg import functional
    from consistency_reg.callbacks import CacheAwareTraining, ConsistencyRegularizer, RoutingMonitor
    from consistency_reg.capture import RouterAdapter, RouterCapture
    from consistency_reg.integrations import attach  # type: ignore[no-redef]
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
    from consistency_reg.offload import OffloadedExperts
    from consistency_reg.rerouting import CacheAwareRouting
    from consistency_reg.routing import RoutingTrace

__version__ = version("consistency-reg")
moved.install()

_ON_FIRST_USE: dict[str, tuple[str, ...]] = {  # module -> the names that come from it
    "callbacks": ("CacheAwareTraining", "ConsistencyRegularizer", "RoutingMonitor"),
    "capture": ("RouterAdapter", "RouterCapture"),
    "functional": (),
    "integrations": ("attach",),
    "losses": ("CacheConsistencyLoss", "LoadBalanceLoss", "LocalConsistencyLoss", "RouterAnchorLoss", "RouterZLoss"),
    "metrics": (
        *("CacheHitRate", "ExpertSpecialization", "RoutingBalance"),
        *("SegmentCacheHitRate", "SegmentRoutingPerformance"),
    ),
    "offload": ("OffloadedExperts",),
    "rerouting": ("CacheAwareRouting",),
    "routing": ("RoutingTrace",),
}

__all__ = [
    "CacheAwareRouting",
    "CacheAwareTraining",
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
        return import_module(f"consistency_reg.{name}")
    for module, names in _ON_FIRST_USE.items():
        if name in names:
            return getattr(import_module(f"consistency_reg.{module}"), name)
    raise AttributeError(f"module 'consistency_reg' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
