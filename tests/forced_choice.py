"""Give a router of transformers another choice than its own, and compute what its own code makes of it.

:class:`Forced` makes the ``topk`` (or ``argmax``) by which a router chooses return given experts instead, so that all
that follows is the architecture's own rule: the oracle of how chosen experts are weighed.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from consistency_reg import RouterCapture
from consistency_reg.rerouting import CacheAwareRouting


class Forced(TorchFunctionMode):
    """Make the choice of K of E is ``expert_ids`` [N, K]; other calls of topk stay as they are."""

    def __init__(self, expert_ids: Tensor, num_experts: int) -> None:
        super().__init__()
        self.expert_ids = expert_ids
        self.num_experts = num_experts
        self.forced = 0

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        values = args[0] if args else None
        if not isinstance(values, Tensor) or values.dim() == 0 or values.shape[-1] != self.num_experts:
            return result
        if function in (torch.topk, Tensor.topk) and result.indices.shape[-1] == self.expert_ids.shape[-1]:
            ids = self.expert_ids.view(result.indices.shape)
            self.forced += 1
            return torch.return_types.topk((values.gather(-1, ids), ids))
        if function in (torch.argmax, Tensor.argmax) and self.expert_ids.shape[-1] == 1:
            self.forced += 1
            return self.expert_ids.view(result.shape)
        if function in (torch.max, Tensor.max) and self.expert_ids.shape[-1] == 1 and not isinstance(result, Tensor):
            ids = self.expert_ids.view(*result.values.shape, 1)
            return torch.return_types.max((values.gather(-1, ids)[..., 0], ids[..., 0]))
        return result


TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


def check_cache_aware(model: nn.Module, inputs: dict[str, Tensor], names: Sequence[str]) -> str:
    """Raise AssertionError unless these routers can be made to know the cache; else "yes", or why not, in words.

    Their routers must have been drawn, so that they tell tokens apart.
    """
    routers = RouterCapture(model).routers
    by_table = [name for name in names if hasattr(routers[name], "tid2eid")]
    layers = pattern(name for name in names if name not in by_table)
    try:
        CacheAwareRouting(model, layers=layers)
    except ValueError as error:
        return "no: " + re.search(r"know the cache: (.*?)\. Leave", str(error))[1]
    check_unchanged(model, inputs, layers)
    check_forced(model, inputs, layers)
    return "yes" if not by_table else f"yes, but for {len(by_table)} routers by table"


def pattern(names: Iterable[str]) -> str:
    """Return what `layers` must be for these routers."""
    return f"^({'|'.join(map(re.escape, names))})$"


def run(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Return the logits, with the same random numbers each time."""
    torch.manual_seed(0)
    with torch.no_grad():
        output = model(**inputs)
    return output.logits if hasattr(output, "logits") else output[0]


def check_unchanged(model: nn.Module, inputs: dict[str, Tensor], layers: str) -> None:
    """Check that a model whose experts are all in the cache is as it was, at strength 0 to the last bit."""
    own = run(model, inputs)
    with CacheAwareRouting(model, cache_ratio=16, strength=1e-9, layers=layers):
        torch.testing.assert_close(run(model, inputs), own, rtol=1e-4, atol=1e-5)
    with CacheAwareRouting(model, strength=0, layers=layers):
        assert torch.equal(run(model, inputs), own)
    assert torch.equal(run(model, inputs), own)


def check_forced(model: nn.Module, inputs: dict[str, Tensor], layers: str) -> None:
    """Check that what goes on from a router is what its own code makes of the choice, which the capture sees."""
    capture = RouterCapture(model, layers=layers)
    calls: dict[str, tuple] = {}
    given: dict[str, tuple] = {}
    with CacheAwareRouting(model, cache_ratio=1, strength=1.0, guaranteed=0, layers=layers) as routing, capture:
        with ExitStack() as hooks:
            for name, router in capture.routers.items():

                def hear(router, args, kwargs, output, *, name=name):
                    calls[name] = (args, kwargs, output)

                def hear_experts(experts, args, *, name=name):
                    given[name] = args

                hooks.callback(router.register_forward_hook(hear, with_kwargs=True).remove)
                block = model.get_submodule(name.rpartition(".")[0])
                if hasattr(block, "route_tokens_to_experts"):
                    hooks.callback(block.experts.register_forward_pre_hook(hear_experts).remove)
            run(model, inputs)
        trace = capture.trace()
    assert routing.hits + routing.misses == sum(layer.expert_ids.numel() for layer in trace)
    changed = 0
    for layer in trace:
        expert_ids = layer.expert_ids.flatten(0, 1)
        args, kwargs, output = calls[layer.name]
        own, expected = forced_call(capture.routers[layer.name], args, kwargs, expert_ids, layer.num_experts)
        if layer.name in given:  # the block chooses, and the experts are given ids before weights
            choose = model.get_submodule(layer.name.rpartition(".")[0]).route_tokens_to_experts
            expected = forced_choice(choose, (own,), {}, expert_ids, layer.num_experts)[::-1]
            own, output = choose(own)[::-1], given[layer.name][1:]
        for part, value in zip(output, expected, strict=True):
            torch.testing.assert_close(torch.as_tensor(part), torch.as_tensor(value), **TOLERANCE)
        changed += not all(
            torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(own, output, strict=True)
        )
    assert changed, "no choice was changed"


def forced_call(router: nn.Module, args: tuple, kwargs: dict, expert_ids: Tensor, num_experts: int) -> tuple[Any, Any]:
    """Return what a router returns, and what it returns for a given choice."""
    with torch.no_grad():
        own = router.forward(*args, **kwargs)
        return own, forced_choice(router.forward, args, kwargs, expert_ids, num_experts)


def forced_choice(function: Callable, args: tuple, kwargs: dict, expert_ids: Tensor, num_experts: int) -> Any:
    """Return what a function returns that chooses experts, for a given choice; the same where it makes none."""
    with torch.no_grad(), Forced(expert_ids, num_experts):
        return function(*args, **kwargs)
