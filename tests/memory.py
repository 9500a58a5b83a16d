"""Measure what PyTorch has allocated at most, which no profiler of Python's own memory sees."""

import numpy as np
from torch.profiler import ProfilerActivity, profile


def peak_bytes(function):
    """Return the most bytes that PyTorch's allocator had out at once while ``function`` ran, kernels included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = function()
    changes = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    assert changes
    assert kept is not None
    return int(np.cumsum([event.nbytes() for event in changes]).max())
