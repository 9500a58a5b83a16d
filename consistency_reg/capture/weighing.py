"""Weigh another choice of experts, and put the weights into a router's output.

The experts of another choice are weighed by the router's own rule from its unchanged logits. A :class:`Weighing` is the
rule of most architectures; :mod:`.known` has those of the others.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from consistency_reg.routing import WEIGHTS


@dataclass(frozen=True)
class RouterCall:
    """Holds one call of a router, which chooses experts for N tokens.

    Attributes:
        router: the router.
        block: the module around it.
        args: what it was given, first its hidden states.
        output: what it returned.
        logits: [N, E] that its adapter reads there.
        score_function: how logits become weights, "softmax", "sigmoid" or "sqrtsoftplus".
    """

    router: nn.Module
    block: nn.Module
    args: tuple[Any, ...]
    output: Any
    logits: Tensor
    score_function: str


class Rerouted(tuple[Any, ...]):
    """Holds a router's output with another choice of experts, and the ids of that choice.

    Example:
        >>> output = Rerouted(("logits", "weights"), torch.tensor([[0, 2]]))
        >>> len(output), output.expert_ids.tolist()
        (2, [[0, 2]])
    """

    expert_ids: Tensor

    def __new__(cls, parts: tuple[Any, ...], expert_ids: Tensor) -> "Rerouted":
        """Return ``parts`` with the ids beside them."""
        output = super().__new__(cls, parts)
        output.expert_ids = expert_ids
        return output


@dataclass(frozen=True)
class Weighing:
    """Weigh chosen experts by ``scale * f(logits)[chosen]``, with or without division by their sum.

    f is the router's score function (softmax over all experts, sigmoid, ...). Divided by the sum, a softmax over all
    experts is a softmax over the chosen ones.

    Args:
        normalized: whether to divide by the sum; the router's own ``norm_topk_prob``, or True without one, when None.
        scale: the router's attribute with a factor; 1 where it has none of this name.
        epsilon: is added to the sum.

    Example: 0.3 and 0.1 of a softmax

        >>> logits = torch.tensor([[0.6, 0.3, 0.1]]).log()
        >>> call = RouterCall(nn.Identity(), nn.Identity(), (), None, logits, "softmax")
        >>> Weighing()(call, torch.tensor([[1, 2]]))
        tensor([[0.7500, 0.2500]])
        >>> Weighing(normalized=False)(call, torch.tensor([[1, 2]]))
        tensor([[0.3000, 0.1000]])
    """

    normalized: bool | None = None
    scale: str = ""
    epsilon: float = 0.0

    def __call__(self, call: RouterCall, expert_ids: Tensor) -> Tensor:
        """Return the weights [N, K] of ``expert_ids`` [N, K], in fp32 or better."""
        logits = call.logits.to(torch.promote_types(call.logits.dtype, torch.float32))
        weights = WEIGHTS[call.score_function](logits).gather(-1, expert_ids)
        is_normalized = getattr(call.router, "norm_topk_prob", True) if self.normalized is None else self.normalized
        if is_normalized:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + self.epsilon)
        return weights * getattr(call.router, self.scale, 1.0) if self.scale else weights
