"""Keep copies of routers as they were before training."""

from copy import deepcopy

import torch
from torch import Tensor, nn

from consistency_reg.capture.adapters import RouterAdapter


class FrozenRouter(nn.Module):
    """Computes the logits of a router as it was: [N, H] router inputs -> [N, E] logits, no gradient.

    Raises:
        ValueError: in a call, of a router that routes by more than its own input.
    """

    def __init__(self, router: nn.Module, adapter: RouterAdapter) -> None:
        super().__init__()
        self.router = deepcopy(router).requires_grad_(False).eval()
        self._adapter = adapter

    @torch.no_grad()
    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits of the router as it was."""
        return self._adapter.logits_of(self.router, inputs)

    def train(self, mode: bool = True) -> "FrozenRouter":
        """Do nothing: the copy stays in evaluation mode."""
        return self
