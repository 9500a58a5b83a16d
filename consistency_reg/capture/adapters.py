"""Adapters: each says how to read one kind of router."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from consistency_reg.capture.selection import score_function, selection_scores
from consistency_reg.capture.weighing import Rerouted, RouterCall

Reader = int | Callable[[Any], Tensor] | None


@dataclass(frozen=True)
class RouterAdapter:
    """Says how to read one kind of router from its forward output.

    Args:
        pattern: regular expression that the name of the router's class, or of a class that it inherits from, must
            match (``re.search``).
        logits: where the [..., E] router logits are: a position in the output, ``output -> logits``, or None where the
            output is the logits.
        expert_ids: where the [..., K] chosen ids are: a position, ``output -> ids``, or None for what the experts
            beside the router were given.
        top_k: K of a router that returns no ids, or the name of its attribute that holds K: the experts of its K
            highest logits are the chosen ones.
        scores: ``(router, logits) -> [..., E]``, what the router selects by.
        score_function: how logits become weights: "softmax", "sigmoid", "sqrtsoftplus", or None where the router's
            attributes tell.
        path: regular expression that the router's name in the model must match too, for a class that serves other ends
            as well.
        weights: ``(call, expert_ids) -> [..., K]``, how the router weighs the experts that it has chosen, such as
            :class:`~consistency_reg.capture.Weighing`; None where this is not known. Cache-aware routing needs it.
        fixed: why the router's choice cannot be changed; empty where it can.

    Example: the gate of a block that was written before transformers 5, a linear layer whose top 2 are the choice

        >>> adapter = RouterAdapter(r"^Linear$", path=r"\\.gate$", logits=None, top_k=2)
        >>> adapter.matches(nn.Linear(4, 8), "layers.0.gate"), adapter.matches(nn.Linear(4, 8), "lm_head")
        (True, False)
    """

    pattern: str
    logits: Reader = 0
    expert_ids: Reader = 2
    top_k: int | str | None = None
    scores: Callable[[nn.Module, Tensor], Tensor] = selection_scores
    score_function: str | None = None
    path: str = ""
    weights: Callable[[RouterCall, Tensor], Tensor] | None = None
    fixed: str = ""

    def matches(self, module: nn.Module, name: str = "") -> bool:
        """Return whether ``module``, which stands at ``name`` in its model, is of this kind."""
        classes = (kind.__name__ for kind in type(module).__mro__)
        return any(re.search(self.pattern, kind) for kind in classes) and re.search(self.path, name) is not None

    def read(self, router: nn.Module, output: Any) -> tuple[Tensor, Tensor | None]:
        """Return (logits, ids) of one call; ids are None where the experts were given them.

        Raises:
            TypeError: the output holds no logits [..., E] or no integer ids [..., K] of the same tokens there.
        """
        try:
            logits = _at(output, self.logits)
            expert_ids = self._read_ids(router, output, logits)
            check(logits, expert_ids)
        except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
            raise TypeError(
                f"must return logits [..., E] at {_place(self.logits)} and integer expert ids [..., K] at "
                f"{'the top of the logits' if self.top_k is not None else _place(self.expert_ids)}, "
                f"got {describe(output)}" + (f" ({error})" if str(error) else "")
            ) from None
        return logits, expert_ids

    def read_scores(self, router: nn.Module, logits: Tensor, expert_ids: Tensor, given: tuple[Any, ...]) -> Tensor:
        """Return what the router selected by; ``given``: what its forward was given after the hidden states."""
        return self.scores(router, logits)

    def read_score_function(self, router: nn.Module) -> str:
        """Return the name of the function by which the router turns logits into weights."""
        return self.score_function or score_function(router)

    def own_weights(self, call: RouterCall, expert_ids: Tensor) -> Tensor:
        """Return the weights [N, K] that the router gave its own choice ``expert_ids`` [N, K]."""
        return _at(call.output, 1)

    def reroute(self, call: RouterCall, expert_ids: Tensor, weights: Tensor) -> Rerouted:
        """Return what the router would have returned for another choice [N, K] with these weights."""
        logits, own_weights, own_ids, *others = call.output
        weights = weights.view(own_weights.shape).to(own_weights.dtype)
        return Rerouted((logits, weights, expert_ids.view(own_ids.shape).to(own_ids.dtype), *others), expert_ids)

    def logits_of(self, router: nn.Module, inputs: Tensor) -> Tensor:
        """Return the logits of a router on [N, H] inputs of its own choice.

        Raises:
            ValueError: its logits depend on more than its input.
        """
        return _at(router(inputs), self.logits)

    def _read_ids(self, router: nn.Module, output: Any, logits: Tensor) -> Tensor | None:
        if isinstance(output, Rerouted):
            return output.expert_ids.reshape(*logits.shape[:-1], -1)
        if self.top_k is None:
            return None if self.expert_ids is None else _at(output, self.expert_ids)
        return logits.topk(getattr(router, self.top_k) if isinstance(self.top_k, str) else self.top_k).indices


def check(logits: Tensor, expert_ids: Tensor | None) -> None:
    """Raise TypeError unless these are logits [..., E] and integer ids [..., K <= E] of the same tokens."""
    if not logits.is_floating_point():
        raise TypeError(f"logits of {logits.dtype}")
    if expert_ids is None:
        return
    if expert_ids.is_floating_point() or expert_ids.dtype == torch.bool:
        raise TypeError(f"ids of {expert_ids.dtype}")
    if logits.shape[:-1] != expert_ids.shape[:-1] or expert_ids.shape[-1] > logits.shape[-1]:
        raise TypeError(f"logits {list(logits.shape)} and ids {list(expert_ids.shape)}")


def tensors_of(values: Any) -> list[Tensor]:
    """Yield the tensors among a module's arguments or in its output."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, Mapping):
        values = values.values()
    elif not isinstance(values, (tuple, list)):
        return []
    return [value for value in values if isinstance(value, Tensor)]


def describe(output: Any) -> str:
    """Return a router's output in words."""
    if isinstance(output, Tensor):
        return f"one tensor of shape {list(output.shape)}"
    if isinstance(output, (tuple, list)):
        parts = (f"{list(o.shape)} {o.dtype}" if isinstance(o, Tensor) else type(o).__name__ for o in output)
        return f"({', '.join(parts)})"
    return type(output).__name__


def _at(output: Any, where: Reader) -> Tensor:
    if callable(where):
        value = where(output)
    elif where is None:
        value = output
    elif isinstance(output, Tensor):
        raise TypeError  # a position in it would be a row
    else:
        value = output[where]
    if not isinstance(value, Tensor):
        raise TypeError
    return value


def _place(where: Reader) -> str:
    if callable(where):
        return "what the adapter reads"
    return "the output itself" if where is None else f"position {where}"
