"""Routing measures as torchmetrics: ``functional`` tells what is measured, here it is summed."""

from consistency_reg.metrics.srp import SegmentRoutingPerformance

__all__ = ["SegmentRoutingPerformance"]
