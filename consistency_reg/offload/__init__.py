"""Experts on a device: a model runs with few of its experts in fast memory, the others are read as tokens need them."""

from consistency_reg.byte_sizes import parse_bytes
from consistency_reg.offload.budget import spread_slots
from consistency_reg.offload.engine import OffloadedExperts
from consistency_reg.offload.statistics import OffloadStatistics

__all__ = ["OffloadStatistics", "OffloadedExperts", "parse_bytes", "spread_slots"]
