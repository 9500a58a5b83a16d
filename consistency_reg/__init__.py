"""Train mixture-of-experts language models for local routing consistency.

The core needs torch and torchmetrics. What needs lightning, transformers, wandb or matplotlib loads on first use and
names the extra that is missing.
"""

from importlib import import_module
from importlib.metadata import version
from typing import Any

from consistency_reg import functional
from consistency_reg.capture import RouterAdapter, RouterCapture
from consistency_reg.losses import CacheConsistencyLoss, LoadBalanceLoss, LocalConsistencyLoss, RouterZLoss
from consistency_reg.routing import RoutingTrace

__version__ = version("consistency-reg")

_LAZY = {
    "ConsistencyRegularizer": "consistency_reg.callbacks",
    "RoutingMonitor": "consistency_reg.callbacks",
}

__all__ = [
    "CacheConsistencyLoss",
    "ConsistencyRegularizer",
    "LoadBalanceLoss",
    "LocalConsistencyLoss",
    "RouterAdapter",
    "RouterCapture",
    "RouterZLoss",
    "RoutingMonitor",
    "RoutingTrace",
    "functional",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'consistency_reg' has no attribute {name!r}")
