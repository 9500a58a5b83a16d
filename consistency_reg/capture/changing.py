"""Check whether a router's choice can be changed, and give its experts another one."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from consistency_reg.capture.finding import Router, how_to_register, is_ids
from consistency_reg.capture.weighing import RouterCall

TOP_K = ("top_k", "num_experts_per_tok", "moe_top_k")
TOLERANCE, TOLERANCE_16_BIT = 1e-3, 3e-2  # relative, of a router's weights


def check_changeable(router: Router) -> None:
    """Raise ValueError if a router's choice cannot be changed, or how it weighs what it has chosen is not known."""
    if router.adapter.fixed:
        raise ValueError(
            f"{router} cannot be made to know the cache: {router.adapter.fixed}. Leave it out with layers=..."
        )
    if router.adapter.weights is None:
        raise ValueError(
            f"{router} cannot be made to know the cache: how it weighs the experts that it has chosen is not known. "
            "Its RouterAdapter must have weights=..., such as Weighing()."
            f"{how_to_register(type(router.module).__name__)}"
        )


def known_top_k(model: nn.Module, router: Router) -> int | None:
    """Return K of a router before it has run, None where it does not say."""
    if isinstance(router.adapter.top_k, int):
        return router.adapter.top_k
    names = (router.adapter.top_k,) if isinstance(router.adapter.top_k, str) else TOP_K
    for owner in (router.module, model.get_submodule(router.block_name)):
        for name in names:
            if isinstance(value := getattr(owner, name, None), int):
                return value
    return None


def check_weights(router: Router, call: RouterCall, own_ids: Tensor, own_weights: Tensor) -> None:
    """Raise ValueError unless a router weighs its own choice [N, K] as its adapter says."""
    tolerance = TOLERANCE if own_weights.dtype in (torch.float32, torch.float64) else TOLERANCE_16_BIT
    weights = weigh(router, call, own_ids).float()
    own = own_weights.reshape(weights.shape).float()
    if not torch.allclose(weights, own, rtol=tolerance, atol=tolerance * 1e-2):
        raise ValueError(
            f"{router} does not weigh its experts as its adapter says (they differ by up to "
            f"{(weights - own).abs().max():.3g}): the weights of other experts would be wrong."
            f"{how_to_register(type(call.router).__name__)}"
        )


def weigh(router: Router, call: RouterCall, expert_ids: Tensor) -> Tensor:
    """Return the weights [N, K] that a router gives these experts, by its own rule from its unchanged logits."""
    assert router.adapter.weights is not None
    return router.adapter.weights(call, expert_ids)


def given_choice(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the ids and the weights among what experts are given: one tensor each, of one shape."""
    given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    (ids,) = (value for value in given if is_ids(value))
    (weights,) = (value for value in given if value.is_floating_point() and value.shape == ids.shape)
    return ids, weights


def exchange(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], expert_ids: Tensor, weights: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what experts are given for another choice [N, K] with these weights."""
    ids, own_weights = given_choice(args, kwargs)

    def exchanged(value: Any) -> Any:
        if value is ids:
            return expert_ids.view(ids.shape).to(ids.dtype)
        return weights.view(ids.shape).to(own_weights.dtype) if value is own_weights else value

    return tuple(map(exchanged, args)), {name: exchanged(value) for name, value in kwargs.items()}
