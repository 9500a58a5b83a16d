"""Find the routers of a model, and say what to do where one is missing."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from consistency_reg.capture.adapters import RouterAdapter, describe, tensors_of

# Classes and attributes that hold the routed experts of a block; shared experts are always on and have no router.
EXPERTS = re.compile(r"Experts?$")
SHARED = re.compile(r"shared", re.IGNORECASE)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)
LOOKS_LIKE_A_ROUTER = re.compile(r"rout|gate$|gating", re.IGNORECASE)


@dataclass(frozen=True)
class Router:
    """Holds a router of a model.

    Attributes:
        name: where it stands in the model.
        module: the router.
        adapter: how to read it.
        experts: the module of the experts beside it, where that is needed to read it.
    """

    name: str
    module: nn.Module
    adapter: RouterAdapter
    experts: nn.Module | None = None

    @property
    def outer_name(self) -> str:
        """Return the router's name in the model before PEFT's target_parameters wrapped the router."""
        return re.sub(r"(\.base_layer)+$", "", self.name)

    @property
    def block_name(self) -> str:
        """Return the name of the module around the router, outside of PEFT's wrappers."""
        return self.outer_name.rpartition(".")[0]

    def __str__(self) -> str:
        return f"router {self.name!r} ({type(self.module).__name__})"


@dataclass(frozen=True)
class ByShape(RouterAdapter):
    """Reads a router of an unknown class: the only floats [..., E] of its output are the logits.

    The ids are those of its output, or those that the experts beside it are given.

    It must select by its logits, which :class:`~consistency_reg.RouterCapture` checks on the first trace.
    """

    def read(self, router: nn.Module, output: Any) -> tuple[Tensor, Tensor | None]:
        """Return (logits, ids) of one call; ids are None where only the experts were given them."""
        found = tensors_of(output)
        ids = [t for t in found if is_ids(t)]
        floats = [t for t in found if t.is_floating_point() and t.dim() >= 2]
        if len(ids) == 1:
            floats = [t for t in floats if t.shape[:-1] == ids[0].shape[:-1] and t.shape[-1] > ids[0].shape[-1]]
        if len(floats) != 1 or len(ids) > 1:
            raise TypeError(
                f"is of no class that is known, and what it returns is ambiguous: it must hold one float tensor "
                f"[..., E] and at most one of integer ids [..., K < E], got {describe(output)}"
            )
        return floats[0], ids[0] if ids else None


def is_ids(tensor: Tensor) -> bool:
    """Return whether a tensor may be expert ids [..., K]."""
    return tensor.dim() >= 2 and tensor.dtype in INTEGERS


def find_routers(model: nn.Module, adapters: Sequence[RouterAdapter], layers: str | None = None) -> dict[str, Router]:
    """Return the routers of a model by name, in its order.

    Raises:
        ValueError: no router at all, experts without a router that can be told, no name of a router matches ``layers``.
    """
    known = _known_routers(model, adapters)
    unknown = _routers_by_shape(model, list(known.values()))
    routers = {name: router for name, _ in model.named_modules() if (router := known.get(name) or unknown.get(name))}
    if not routers:
        raise ValueError(
            f"model must contain mixture-of-experts routers, got {type(model).__name__} without one that an adapter "
            f"knows. {_what_looks_alike(model)}"
        )
    if layers is None:
        return routers
    chosen = {name: router for name, router in routers.items() if re.search(layers, name)}
    if not chosen:
        raise ValueError(f"layers must match the name of at least one router, got {layers!r} for {list(routers)}")
    return chosen


def how_to_register(class_name: str) -> str:
    """Return the lines of code that make a router known."""
    return (
        "\nA RouterAdapter tells how to read it:\n"
        "    adapter = RouterAdapter(\n"
        f'        r"^{class_name}$",  # its class; path=r"\\.gate$" as well where others are of that class\n'
        "        logits=0, expert_ids=2,  # where its output has logits [..., E] and ids [..., K], or top_k=K\n"
        "        scores=lambda router, logits: logits,  # what it selects by\n"
        "    )\n"
        "    RouterCapture(model, [adapter])"
    )


def _known_routers(model: nn.Module, adapters: Sequence[RouterAdapter]) -> dict[str, Router]:
    routers: dict[str, Router] = {}
    last = ""
    for name, module in model.named_modules():
        if last and name.startswith(f"{last}."):
            continue  # a part of a router
        # PEFT's modules_to_save holds a router and its trained copies: it calls one of them, so it is the router
        router = getattr(module, "original_module", module)
        adapter = next((adapter for adapter in adapters if adapter.matches(router, name)), None)
        if adapter is not None:
            found = Router(name, module, adapter)
            if adapter.expert_ids is None and adapter.top_k is None:
                found = Router(name, module, adapter, _experts_beside(model, found))
            routers[name] = found
            last = name
    return routers


def _routers_by_shape(model: nn.Module, known: Sequence[Router]) -> dict[str, Router]:
    """Return routers of unknown classes: what looks like one next to experts that no known router serves."""
    served = [router.block_name for router in known]
    routers: dict[str, Router] = {}
    for name, experts in _routed_experts(model).items():
        block_name = re.sub(r"(\.base_layer)+$", "", name).rpartition(".")[0]
        if any(router == block_name or _is_within(router, block_name) or not block_name for router in served):
            continue
        block = model.get_submodule(block_name)
        beside = {
            child_name: child
            for child_name, child in block.named_children()
            if child is not experts
            and not SHARED.search(child_name)
            and (LOOKS_LIKE_A_ROUTER.search(child_name) or LOOKS_LIKE_A_ROUTER.search(type(child).__name__))
        }
        if len(beside) != 1:
            raise ValueError(
                f"{type(block).__name__} at {block_name!r} has routed experts ({type(experts).__name__}) but "
                f"{'no module beside them that could be' if not beside else f'{list(beside)}, any of which could be'} "
                f"their router.{how_to_register(type(block).__name__)}"
            )
        ((child_name, child),) = beside.items()
        full_name = f"{block_name}.{child_name}".lstrip(".")
        routers[full_name] = Router(full_name, child, ByShape(f"^{type(child).__name__}$", expert_ids=None), experts)
    return routers


def _routed_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Return the outermost modules of routed experts, by name."""
    found: dict[str, nn.Module] = {}
    last = ""
    for name, module in model.named_modules():
        if last and name.startswith(f"{last}."):
            continue
        attribute, kind = name.rpartition(".")[2], type(module).__name__
        shared = SHARED.search(attribute) or (attribute != "experts" and SHARED.search(kind))
        if shared or next(module.parameters(), None) is None:
            continue
        if attribute == "experts" or EXPERTS.search(kind):
            found[name] = module
            last = name
    return found


def _experts_beside(model: nn.Module, router: Router) -> nn.Module | None:
    block = model.get_submodule(router.block_name)
    return next(iter(_routed_experts(block).values()), None)


def _is_within(name: str, block_name: str) -> bool:
    return name.startswith(f"{block_name}.")


def _what_looks_alike(model: nn.Module) -> str:
    alike = sorted(
        {type(m).__name__ for m in model.modules() if re.search(r"rout|gate|expert|moe", type(m).__name__, re.I)}
    )
    if not alike:
        return "It looks dense."
    return (
        f"Modules that look like a part of one: {alike}; name the router in a RouterAdapter.{how_to_register(alike[0])}"
    )
