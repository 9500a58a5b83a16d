"""Return what a model has learned as one vector."""

import torch
from torch.distributed.tensor import DTensor


def parameters(model) -> torch.Tensor:
    """Return all parameters of a model, whole where they are sharded."""
    whole = (p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters())
    return torch.cat([parameter.detach().flatten() for parameter in whole])
