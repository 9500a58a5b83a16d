"""Sum over data-parallel processes."""

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Return the number of data-parallel processes, 1 outside of a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def largest(number: int, device: torch.device) -> int:
    """Return the largest of the processes' numbers, for which the host waits; with one process that is its own."""
    if world_size() == 1:
        return number
    message = torch.tensor(number, device=device)
    dist.all_reduce(message, dist.ReduceOp.MAX)
    return int(message)


def all_sum(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the sums over all processes of tensors of one dtype without a graph, in one message.

    With one process these are the tensors themselves.
    """
    if world_size() == 1:
        return tensors
    message = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(message)
    parts = message.split([tensor.numel() for tensor in tensors])
    return tuple(part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True))
