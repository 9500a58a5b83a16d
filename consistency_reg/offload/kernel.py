"""Compute experts one after the other, with the operations and in the order of a model's own eager loop.

So outputs are those of the model in memory, bit for bit where matrix products are reproducible.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from consistency_reg.offload.memory import Visit
from consistency_reg.optional import require

Kernel = Callable[[Any, Visit, Tensor, Tensor, Tensor], Tensor]


def kernel_of(module: nn.Module) -> Kernel:
    """Return what computes the experts of a layer.

    It is called with the module, a visit that brings the experts' weights, the hidden states [N, H], the chosen experts
    [N, K] and their weights [N, K], and returns the sum of each token's experts, [N, H].
    """
    return _plain if is_plain(module) else _own_loop


def is_plain(module: Any) -> bool:
    """Return whether an expert is a gated MLP without bias, with transformers' default gate: most architectures."""
    with require("transformers"):
        from transformers.integrations.moe import _default_apply_gate
    return bool(
        module.has_gate
        and not module.has_bias
        and not getattr(module, "has_post_expert_norm", False)
        and module.is_concatenated
        and type(module)._apply_gate is _default_apply_gate
    )


def _plain(module: Any, visit: Visit, hidden_NH: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """Compute gated MLPs."""
    if len(hidden_NH) == 1:
        return _single_token(module, visit, hidden_NH, ids_NK, weights_NK)
    ids_KN = ids_NK.T
    total_NH = torch.zeros_like(hidden_NH)
    for expert in visit.experts:
        place, token = torch.where(ids_KN == expert)
        output = _gated_mlp(module, visit.rows(expert), hidden_NH[token]) * weights_NK[token, place, None]
        total_NH.index_add_(0, token, output.to(total_NH.dtype))
        visit.done(expert)
    return total_NH


def _single_token(module: Any, visit: Visit, hidden_1H: Tensor, ids_1K: Tensor, weights_1K: Tensor) -> Tensor:
    """Compute the experts first that need not be waited for, and sum in the order of the eager loop."""
    place = {expert: k for k, expert in enumerate(ids_1K[0].tolist())}
    outputs = {}
    for expert in visit.hits_first:
        k = place[expert]
        outputs[expert] = _gated_mlp(module, visit.rows(expert), hidden_1H) * weights_1K[:, k : k + 1]
        visit.done(expert)
    total_1H = torch.zeros_like(hidden_1H)
    for expert in visit.experts:
        total_1H += outputs[expert].to(total_1H.dtype)
    return total_1H


def _gated_mlp(module: Any, rows: Any, states: Tensor) -> Tensor:
    if module.is_transposed:
        gate, up = (states @ rows["gate_up_proj"]).chunk(2, dim=-1)
        return (module.act_fn(gate) * up) @ rows["down_proj"]
    gate, up = nn.functional.linear(states, rows["gate_up_proj"]).chunk(2, dim=-1)
    return nn.functional.linear(module.act_fn(gate) * up, rows["down_proj"])


class _Indexed:
    """Stand in for a weight [E, ...]: indexing it gives an expert's part when that has arrived."""

    def __init__(self, name: str, rows: Callable[[int], Any]) -> None:
        self._name, self._rows = name, rows

    def __getitem__(self, expert: Any) -> Tensor:
        row: Tensor = self._rows(int(expert))[self._name]
        return row


def _own_loop(module: Any, visit: Visit, hidden_NH: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """Run the architecture's own eager loop, which goes through the experts in increasing order."""
    present: list[int] = []

    def rows(expert: int) -> Any:
        if present != [expert]:
            for earlier in present:
                visit.done(earlier)
            present[:] = [expert]
        return visit.rows(expert)

    names = [name for name, parameter in module.named_parameters(recurse=False) if parameter.is_meta]
    for name in names:
        module.__dict__[name] = _Indexed(name, rows)  # found before the parameter on the meta device
    try:
        output: Tensor = type(module).forward.__wrapped__(module, hidden_NH, ids_NK, weights_NK)
    finally:
        for name in names:
            del module.__dict__[name]
    for last in present:
        visit.done(last)
    return output
