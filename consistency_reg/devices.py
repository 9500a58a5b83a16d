"""Decide by device which implementation runs.

| tensors on | small operations | kernels |
|---|---|---|
| a CPU | cost little, and values may be read | none: the functional versions are written for it |
| a CUDA or ROCm GPU | cost a launch, and reading a value makes the host wait | Triton's, where it is installed |
| another accelerator (XPU, MPS, ...) | as on a GPU | none; caches are simulated on the CPU |

MPS has no float64, in which the metrics sum: give them traces that are on the CPU.
"""

import functools
from importlib.util import find_spec

from torch import Tensor


def is_on_host(tensor: Tensor) -> bool:
    """Return whether small operations cost little and values may be read without waiting: on a CPU.

    Example:
        >>> import torch
        >>> is_on_host(torch.zeros(1)), is_on_host(torch.zeros(1, device="meta"))
        (True, False)
    """
    return tensor.device.type == "cpu"


def has_kernels(tensor: Tensor) -> bool:
    """Return whether a kernel can work on this tensor: it is on a GPU, and Triton is installed."""
    return tensor.is_cuda and _triton_is_installed()


@functools.cache
def _triton_is_installed() -> bool:
    return find_spec("triton") is not None
