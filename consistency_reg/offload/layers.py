"""Find the modules of a model that hold its routed experts, where transformers' ExpertsInterface computes them."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

DECLARED = ("has_gate", "has_bias", "is_transposed", "_apply_gate")  # by transformers' use_experts_implementation
TOP_K_NAMES = ("num_experts_per_tok", "moe_topk", "moe_top_k", "top_k_experts", "moe_k", "num_experts_per_token")


@dataclass(frozen=True)
class ExpertLayer:
    """Describes the routed experts of one layer.

    Attributes:
        name: of the module in its model.
        module: which transformers calls with (hidden states, ids, weights).
        num_experts: E.
        shapes: of one expert's part of each weight, by the weight's name.
    """

    name: str
    module: nn.Module
    num_experts: int
    shapes: dict[str, tuple[int, ...]]

    @property
    def expert_elements(self) -> int:
        """The number of weights of one expert."""
        return sum(torch.Size(shape).numel() for shape in self.shapes.values())


def find_expert_layers(model: nn.Module) -> list[ExpertLayer]:
    """Return the layers of routed experts in the order of the model's modules.

    Raises:
        ValueError: no module's experts go through transformers' ExpertsInterface.
    """
    found = []
    for name, module in model.named_modules():
        if all(hasattr(module, attribute) for attribute in DECLARED) and hasattr(module, "num_experts"):
            E = int(module.num_experts)
            shapes = {
                weight: tuple(parameter.shape[1:])
                for weight, parameter in module.named_parameters(recurse=False)
                if parameter.dim() > 1 and parameter.shape[0] == E
            }
            found.append(ExpertLayer(name, module, E, shapes))
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no experts that go through transformers' ExpertsInterface, "
            f"the one place where they can be offloaded{_seen(model)}"
        )
    return found


def experts_per_token(config: object) -> int | None:
    """Return K as the model's configuration names it; None where no usual name is there."""
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in TOP_K_NAMES:
        value = getattr(text_config, name, None)
        if isinstance(value, int):
            return value
    return None


def _seen(model: nn.Module) -> str:
    """Name the modules that look like experts, for the message that they cannot be offloaded."""
    kinds = _experts_like(type(module).__name__ for module in model.modules())
    return f"; its own are computed by {', '.join(kinds)}" if kinds else ""


def _experts_like(kinds: Iterable[str]) -> list[str]:
    return sorted({kind for kind in kinds if "expert" in kind.lower() or "moe" in kind.lower()} - {""})[:4]
