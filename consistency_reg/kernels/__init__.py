"""Triton versions of what is slow on a GPU as tensor operations: each equals its ``functional/`` version bit for bit.

Triton is not needed: where it is missing, and on a CPU, the ``functional/`` versions do the work. The modules beside
this one import it, so they are to be imported where :func:`takes` says yes, and nowhere else.
"""

import functools
from importlib.util import find_spec

from torch import Tensor


def takes(tensor: Tensor) -> bool:
    """Whether a kernel can work on this tensor: it is on a GPU, and Triton is installed."""
    return tensor.is_cuda and _triton_is_installed()


@functools.cache
def _triton_is_installed() -> bool:
    return find_spec("triton") is not None
