"""Routing measures as torchmetrics: ``functional`` tells what is measured, here it is summed."""

from consistency_reg.metrics.balance import RoutingBalance
from consistency_reg.metrics.cache_hits import CacheHitRate, SegmentCacheHitRate
from consistency_reg.metrics.specialization import ExpertSpecialization
from consistency_reg.metrics.srp import SegmentRoutingPerformance

__all__ = [
    "CacheHitRate",
    "ExpertSpecialization",
    "RoutingBalance",
    "SegmentCacheHitRate",
    "SegmentRoutingPerformance",
]
