"""Measure what this machine needs for an expert and for a token, and predict the time of a token from it."""

import copy
import math
import time
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from consistency_reg.offload.engine import OffloadedExperts


@dataclass(frozen=True)
class Calibration:
    """Holds what a model costs on this machine.

    Attributes:
        bandwidth: bytes per second of random reads of whole experts, so many at once as a token's misses would be.
        compute_seconds: of one token whose experts are all there.
        expert_bytes: that a miss reads, the mean over the layers.
        at_once: experts that were read together.
        way: how they were read, as in the statistics.
        native_bandwidth: bytes per second of the same reads when no ``read_bandwidth`` holds them back.
    """

    bandwidth: float
    compute_seconds: float
    expert_bytes: float
    at_once: int
    way: str
    native_bandwidth: float = math.nan

    def seconds_per_token(self, misses: float) -> float:
        """Return what a token with so many misses takes at least: its reads and its computing, one after the other.

        Example:
            >>> Calibration(1e9, 0.004, 2e6, 4, "direct").seconds_per_token(3)
            0.01
        """
        return self.compute_seconds + misses * self.expert_bytes / self.bandwidth


def calibrate(
    offloaded: "OffloadedExperts", ids: Tensor, *, at_once: int | None = None, reads: int = 200, passes: int = 20
) -> Calibration:
    """Measure an attached model.

    Args:
        offloaded: attached; it is reset.
        ids: [1, T] tokens, at least 2, of which all but the last are read at once, and the last again and again.
        at_once: experts that are read together; K when None.
        reads: experts to read.
        passes: of the last token.

    Raises:
        RuntimeError: it is not attached.
        ValueError: fewer than two tokens, or more than one row.
    """
    if offloaded.model is None:
        raise RuntimeError("calibrate needs an attached model: use it inside of `with offloaded:`")
    if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] < 2:
        raise ValueError(f"ids must be one row of at least 2 tokens, got shape {list(ids.shape)}")
    at_once = at_once or offloaded.top_k or 1
    compute = _compute_seconds(offloaded, ids, passes)
    with offloaded.reads_unhindered():
        native = _bandwidth(offloaded, at_once, reads)
    bandwidth = native if offloaded.read_bandwidth is None else _bandwidth(offloaded, at_once, reads)
    sizes = [offloaded.expert_bytes(layer) for layer in range(len(offloaded.slots))]
    way = offloaded.statistics().way
    offloaded.reset()
    return Calibration(bandwidth, compute, sum(sizes) / len(sizes), at_once, way, native)


@torch.no_grad()
def _compute_seconds(offloaded: "OffloadedExperts", ids: Tensor, passes: int) -> float:
    """Return the median of a token that comes again at its place, less what it waits for experts of no slot."""
    model: Any = offloaded.model
    offloaded.reset()
    before = model(ids[:, :-1], use_cache=True).past_key_values
    offloaded.reset()  # else "lfu" may evict what came least often, one expert of the token for another
    times = []
    for number in range(passes + 1):
        state = copy.deepcopy(before)
        offloaded.forget()
        began = time.perf_counter()
        model(ids[:, -1:], past_key_values=state, use_cache=True)
        offloaded.finish()
        if number:  # the first brings the experts, which "fixed" does not keep
            times.append(time.perf_counter() - began - offloaded.statistics().seconds_waiting)
    return median(times)


def _bandwidth(offloaded: "OffloadedExperts", at_once: int, reads: int) -> float:
    """Return the bytes per second of random reads into memory of the kind that slots are of."""
    generator = torch.Generator().manual_seed(0)
    E = offloaded.num_experts
    total, elapsed = 0, 0.0
    held: dict[int, list[dict[str, Tensor]]] = {}
    for _ in range(max(1, reads // at_once)):
        layer = int(torch.randint(len(E), (1,), generator=generator))
        experts = torch.randperm(E[layer], generator=generator)[:at_once].tolist()
        rows = [offloaded.empty_rows(layer) for _ in experts] if layer not in held else held[layer]
        held[layer] = rows
        began = time.perf_counter()
        for wait in [offloaded.fetch(layer, expert, rows[i]) for i, expert in enumerate(experts)]:
            wait()
        offloaded.finish()
        elapsed += time.perf_counter() - began
        total += len(experts) * offloaded.expert_bytes(layer)
    return total / elapsed
