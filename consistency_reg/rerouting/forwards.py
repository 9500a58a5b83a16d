"""The forward that a router's call belongs to: its batch, its masks, and the caches of experts that it continues."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from consistency_reg.capture.hooks import OwnedHook
from consistency_reg.masks import Masks, batch_masks, named_arguments
from consistency_reg.rerouting.running_caches import RunningCaches, cached_tokens, keep, kv_cache, running_caches

TOKENS = ("input_ids", "inputs_embeds")


@dataclass
class Forward:
    """Holds one forward of a stack of layers.

    Attributes:
        shape: (B, T), None where it cannot be told.
        masks: (valid, document_ids), each [B, T] or None.
        running: the caches before its first token, and after its last as routers run.
        cache: the KV cache that it was given, or None.
        remembers: whether its backward pass may run routers again.
        heard: the routers that ran.
        depth: modules of the stack that are being called.
    """

    shape: tuple[int, int] | None
    masks: Masks
    running: RunningCaches
    cache: Any = None
    remembers: bool = False
    heard: set[str] = field(default_factory=set)
    depth: int = 1

    def masks_of(self, shape: tuple[int, int]) -> Masks:
        """Return the masks if they are of tokens of this shape; a vision tower has others than the text."""
        valid, document_ids = self.masks
        return (
            valid if valid is not None and valid.shape == shape else None,
            document_ids if document_ids is not None and document_ids.shape == shape else None,
        )


@dataclass
class Stack:
    """Holds the layers of some routers, whose call is a forward.

    Attributes:
        modules: the innermost model around the routers; where none is called with tokens, all modules around them, of
            which the outermost that is called counts.
        routers: their names.
        open: its forwards that have not ended.
    """

    modules: list[nn.Module]
    routers: list[str] = field(default_factory=list)
    open: list[Forward] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Return the class name of the stack's outermost module."""
        return type(self.modules[0]).__name__


class Forwards:
    """Follows the forwards of a model's stacks.

    Args:
        model: contains the routers.
        routers: their names.
        masks: ``forward's arguments by name -> (valid, document_ids)``; reads the usual names when None.
    """

    def __init__(
        self,
        model: nn.Module,
        routers: Sequence[str],
        masks: Callable[[Mapping[str, Any]], Masks] | None = None,
    ) -> None:
        self.masks = masks
        self.given_masks: Masks | None = None  # of the next forwards, for callers that know them better
        self.active = True
        self.owner = object()
        self._stacks = _stacks_of(model, routers)
        self._stack_of = {name: stack for stack in self._stacks for name in stack.routers}

    def listen(self) -> list[RemovableHandle]:
        """Hook into the stacks, and return the handles of the hooks."""
        handles = []
        for index, stack in enumerate(self._stacks):
            stack.open.clear()
            for module in stack.modules:
                begin, end = OwnedHook(self, "_begin", index), OwnedHook(self, "_end", index)
                handles.append(module.register_forward_pre_hook(begin, with_kwargs=True, prepend=True))
                handles.append(module.register_forward_hook(end, always_call=True, prepend=True))
        return handles

    def of(self, router: str) -> Forward | None:
        """Return the forward that a call of a router belongs to now, None outside of one."""
        stack = self._stack_of[router]
        return stack.open[-1] if stack.open else None

    def stack_name(self, router: str) -> str:
        """Return the class of the stack of a router."""
        return self._stack_of[router].name

    def forget(self) -> None:
        """Forget the caches, so that no forward continues them."""
        self.owner = object()

    @torch.compiler.disable
    def _begin(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stack = self._stacks[index]
        if not self.active:
            return
        given = named_arguments(module, args, kwargs)
        shape, cache = _batch_shape(given), kv_cache(given)
        if stack.open and len(stack.modules) > 1:
            outer = stack.open[-1]
            outer.depth += 1
            if outer.shape is None:  # it was called with a batch of another kind, as DDP calls Lightning's steps
                outer.shape, outer.masks = shape, self._read_masks(given, shape, cache)
            return
        running = None if cache is None else running_caches(cache, self.owner, shape and shape[0])
        masks = self._read_masks(given, shape, cache)
        running = running or RunningCaches(self.owner)
        stack.open.append(Forward(shape, masks, running, cache, remembers=torch.is_grad_enabled()))

    @torch.compiler.disable
    def _end(self, index: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        stack = self._stacks[index]
        if not stack.open:
            return
        stack.open[-1].depth -= 1
        if stack.open[-1].depth:
            return
        forward = stack.open.pop()
        if output is None or not self.active:
            return  # an error ended it
        if not forward.heard:
            raise RuntimeError(
                f"none of the routers {stack.routers} was called in a forward of the {type(module).__name__}, so their "
                "choice is as it was: a fused or replaced MoE block by-passes them, or the model was compiled before "
                "CacheAwareRouting was attached. Routers that need not run are left out with layers=..."
            )
        cache = forward.cache if forward.cache is not None else _cache_returned(output)
        if cache is not None:
            keep(cache, forward.running)

    def _read_masks(self, given: dict[str, Any], shape: tuple[int, int] | None, cache: Any) -> Masks:
        if self.given_masks is not None:
            return self.given_masks
        if self.masks is not None:
            return self.masks(given)
        if shape is None:
            return None, None
        mask = given.pop("attention_mask", None)
        if isinstance(mask, Mapping):  # one for each kind of attention
            mask = mask.get("full_attention", next(iter(mask.values()), None))
        before = 0 if cache is None else cached_tokens(cache)
        valid = last_tokens(mask, shape[1], before)
        if cache is not None:  # each row is one document, which continues
            return valid, None
        return valid, batch_masks(given)[1]


def last_tokens(mask: Any, tokens: int, before: int | None) -> Tensor | None:
    """Return which of the last tokens an attention mask calls real: [B, T] bool, None where it does not say.

    Args:
        mask: [B, tokens before and now], or [B, 1, T, tokens before and now, or more] for each query.
        tokens: T, those of this forward.
        before: those before them; None where it is not known.

    Example:
        >>> last_tokens(torch.tensor([[0, 1, 1, 1]]), tokens=2, before=2)
        tensor([[True, True]])
    """
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        return None
    if mask.dim() == 4:  # what the last token may look at; masks that are added are 0 there
        mask = mask[:, 0, -1]
        mask = mask if mask.dtype == torch.bool else mask == 0
    first = mask.shape[1] - tokens if before is None or mask.shape[1] < before + tokens else before
    return mask[:, first : first + tokens].bool() if first >= 0 else None


def _stacks_of(model: nn.Module, routers: Sequence[str]) -> list[Stack]:
    stacks: dict[int, Stack] = {}
    loose = Stack([])
    for router in routers:
        names = router.split(".")
        around = [model, *(model.get_submodule(".".join(names[:depth])) for depth in range(1, len(names)))]
        innermost = next((module for module in around[::-1] if _takes_tokens(module)), None)
        if innermost is not None:
            stacks.setdefault(id(innermost), Stack([innermost])).routers.append(router)
            continue
        loose.routers.append(router)
        loose.modules += [module for module in around if not any(module is known for known in loose.modules)]
    return [*stacks.values(), *([loose] if loose.routers else [])]


def _takes_tokens(module: nn.Module) -> bool:
    return any(name in inspect.signature(module.forward).parameters for name in TOKENS)


def _batch_shape(given: Mapping[str, Any]) -> tuple[int, int] | None:
    named = [given[name] for name in TOKENS if isinstance(given.get(name), Tensor)]
    first = next((value for value in (*named, *given.values()) if isinstance(value, Tensor)), None)
    return None if first is None or first.dim() < 2 else (first.shape[0], first.shape[1])


def _cache_returned(output: Any) -> Any:
    if isinstance(output, Mapping):
        return kv_cache(output)
    values = output if isinstance(output, tuple) else ()
    return next((value for value in values if hasattr(value, "get_seq_length")), None)
