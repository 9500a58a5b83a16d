"""Register the function that transformers' ExpertsInterface calls for offloaded experts, for each call's engine."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from consistency_reg.offload.layers import ExpertLayer
from consistency_reg.optional import require

IMPLEMENTATION = "consistency_reg_offload"
Compute = Callable[
    [int, nn.Module, Tensor, Tensor, Tensor], Tensor
]  # number of the layer, module, states, ids, weights


class Dispatch:
    """Has transformers compute the experts of some layers by a function, until it is undone.

    Args:
        layers: of experts.
        compute: called with the number of the layer and what the layer's module is called with.
    """

    def __init__(self, layers: Sequence[ExpertLayer], compute: Compute) -> None:
        with require("transformers"):
            from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, offloaded_experts)
        self._modules: list[Any] = [layer.module for layer in layers]
        configs = {id(module.config): module.config for module in self._modules}
        self._implementations = [(config, config._experts_implementation) for config in configs.values()]
        for config in configs.values():
            config._experts_implementation_internal = IMPLEMENTATION
        for number, module in enumerate(self._modules):
            module._offloaded = partial(compute, number)

    def undo(self) -> None:
        """Give the modules their own implementation back."""
        for module in self._modules:
            del module._offloaded
        for config, implementation in self._implementations:
            config._experts_implementation_internal = implementation


@torch.compiler.disable
def offloaded_experts(module: Any, hidden_NH: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """Compute the experts of a layer by way of the slots.

    Raises:
        RuntimeError: the model is used outside of its ``with`` block.
    """
    compute = getattr(module, "_offloaded", None)
    if compute is None:
        raise RuntimeError("experts are offloaded no longer: use the model inside of `with OffloadedExperts(...)`")
    output: Tensor = compute(module, hidden_NH, ids_NK, weights_NK)
    return output
