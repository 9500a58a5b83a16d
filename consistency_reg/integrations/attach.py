"""Add the consistency term to the loss that a model itself returns, whoever trains it."""

import math
import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from consistency_reg.capture import RouterAdapter
from consistency_reg.capture.hooks import OwnedHook
from consistency_reg.integrations.carry import carry
from consistency_reg.integrations.model_loss import Factors, add_to_loss
from consistency_reg.losses import RouterAnchorLoss, RoutingLoss
from consistency_reg.masks import Masks, named_arguments
from consistency_reg.rerouting import CacheAwareRouting, RoutingSchedule, TrainedRouting
from consistency_reg.routing import RoutingTrace
from consistency_reg.session import Listener, ListenOptions, RoutingSession, Which
from consistency_reg.term import Term, check_loss, check_weight, warn_of_frozen

Scale = Callable[[Tensor], Tensor]


def attach(
    model: nn.Module,
    loss: RoutingLoss | None = None,
    weight: float = 0.35,
    *,
    scale: float | Scale | None = None,
    masks: Callable[[Mapping[str, Any]], Masks] | None = None,
    adapters: Sequence[RouterAdapter] = (),
    keep_inputs: bool = False,
    layers: str | None = None,
    tokens: Which = "all",
    routing: RoutingSchedule | None = None,
) -> "Attachment":
    """Train ``weight * term`` with what is trained of ``model``, in training, until the handle is detached.

    Without ``scale`` the model returns ``loss + weight * term`` for its loss: the term counts as the model's loss does,
    so ``(model(**batch).loss / 4).backward()`` has a fourth of both, and a loop of your own, accelerate and gradient
    scalers need nothing else. A backward pass through anything else that the model returned (logits,
    log-probabilities) is refused, as it does not say by what it was divided.

    With ``scale`` the model returns what it always does, and each forward that is trained, through whatever it
    returned, adds ``scale * weight * term`` to the gradient: for a policy, preference or reward loss.

    In transformers' and TRL's trainers use :class:`~consistency_reg.integrations.ConsistencyCallback`, which knows the
    scale. Only forwards in training mode with autograd get the term; evaluation and generation are as they were. The
    model keeps its class, its parameters and its files; a copy or a pickle of it is free of the term.

    Attach to the model that is called: after PEFT has wrapped it, before ``torch.compile``; before or after
    accelerate, DDP and FSDP2.

    Args:
        model: holds routers, and without ``scale`` returns a loss in training (given labels).
        loss: any :class:`~consistency_reg.losses.RoutingLoss`; ``LocalConsistencyLoss()`` when None.
        weight: weight of the term, >= 0; may be set on the handle later.
        scale: a number, ``1 / micro-batches of an optimizer step``, or a function of 1 (a scalar tensor), such as
            ``lambda one: scaler.scale(one) / 4`` under a gradient scaler.
        masks: ``forward's arguments by name -> (valid, document_ids)``, each [B, T] or None; reads what the model and
            those inside of it are called with when None (docs/tokens.md).
        adapters: kinds of routers that the capture does not know by itself.
        keep_inputs: capture the routers' inputs too, which :class:`~consistency_reg.RouterAnchorLoss` needs.
        layers: regular expression on the routers' names; those that ran with gradient when None.
        tokens: "labels": only tokens that have a label count; "all": all that are no padding.
        routing: train with cache-aware routing in the forward pass, ``RoutingSchedule(strength=0.1)``; without when
            None. Where it changes from step to step, call ``begin_step(step)`` on the handle.

    Returns:
        the :class:`Attachment`, which is a context manager as well.

    Raises:
        ValueError: a negative or non-finite weight, a scale that is no number above 0; a model without routers.
        RuntimeError: in a training forward: a term without gradient (reentrant checkpointing); without ``scale``, no
            loss (no labels), or ``num_items_in_batch``, with which the caller adds micro-batches up. In a backward
            pass without ``scale``: something else than the model's loss is trained, or its factor is not a constant.

    Warns:
        UserWarning: all routers are frozen; a loss of this kind is attached already.

    Example:
        >>> class ToyTopKRouter(nn.Linear):
        ...     def forward(self, x):
        ...         logits = super().forward(x)
        ...         weights, ids = logits.softmax(-1).topk(2)
        ...         return logits, weights, ids
        >>> class Toy(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.router = ToyTopKRouter(8, 4)
        ...     def forward(self, x):
        ...         return {"loss": self.router(x)[1].mean()}
        >>> model = Toy()
        >>> with attach(model, weight=0.35) as term:
        ...     model(torch.randn(2, 9, 8))["loss"].backward()
        >>> 0 < term.value < 1, list(term.per_layer)
        (True, ['router'])
    """
    options = ListenOptions(masks, adapters, layers, tokens, keep_inputs)
    return Attachment(model, loss, weight, scale=scale, options=options, routing=routing).attach()


class Attachment:
    """Hold the term that :func:`attach` has added to a model: to read, to re-weight and to detach.

    Attributes:
        loss: the routing loss.
        term: the :class:`~consistency_reg.term.Term` of the last training forward, without its graph, or None.
        during: the one training that it is for, or None.
        trained_routing: the cache-aware routing of training forwards with its schedule, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: RoutingLoss | None = None,
        weight: float = 0.35,
        *,
        scale: float | Scale | None = None,
        options: ListenOptions,
        routing: RoutingSchedule | None = None,
    ) -> None:
        self.loss = check_loss(loss)
        self.weight = weight
        self._scale = _check_scale(scale)
        self._factors = Factors()
        self.term: Term | None = None
        self.during: Any = None
        self._model = model
        keep_inputs = options.keep_inputs or isinstance(self.loss, RouterAnchorLoss)
        self._options = replace(options, keep_inputs=keep_inputs)
        self._listener: Listener | None = None
        self._layer_names: tuple[str, ...] = ()
        self.trained_routing = None if routing is None else TrainedRouting(model, routing, options)
        self._handles: list[RemovableHandle] = []
        self._called = False

    @property
    def weight(self) -> float:
        """Return the weight of the term from the next forward on; it may be set."""
        return self._weight

    @weight.setter
    def weight(self, weight: float) -> None:
        self._weight = check_weight(weight)

    @property
    def routing(self) -> CacheAwareRouting | None:
        """Return the cache-aware routing of training forwards, or None."""
        return None if self.trained_routing is None else self.trained_routing.routing

    def begin_step(self, step: int) -> None:
        """Give the routing the strength and the cache of an optimizer step; without effect where there is none."""
        if self.trained_routing is not None:
            self.trained_routing.begin(step)

    @property
    def value(self) -> float:
        """Return the raw term of the last training forward, a mean over layers; NaN before the first."""
        return float("nan") if self.term is None else self.term.value.item()

    @property
    def per_layer(self) -> dict[str, float]:
        """Return the raw term of the last training forward by the router's name; empty before the first."""
        return {} if self.term is None else dict(zip(self._layer_names, self.term.per_layer.tolist(), strict=True))

    def attach(self) -> "Attachment":
        """Add the term from the next forward on; without effect when attached already."""
        if self._handles:
            return self
        self.warn_of_others()
        self._called = False
        self._listener = RoutingSession.of(self._model).listen(self._options)
        warn_of_frozen(self._listener)
        if self.trained_routing is not None:
            self.trained_routing.attach()
        router = self._model.get_submodule(self._listener.layer_names[0])
        self._handles = [
            self._model.register_forward_pre_hook(OwnedHook(self, "_note_call")),
            self._model.register_forward_hook(OwnedHook(self, "_add_term"), with_kwargs=True),
            router.register_forward_hook(OwnedHook(self, "_check_call")),
        ]
        return self

    def warn_of_others(self) -> None:
        """Warn if a loss of this kind is attached to the model already."""
        if any(type(other.loss) is type(self.loss) for other in attachments(self._model)):
            warnings.warn(
                f"a {type(self.loss).__name__} is attached to this {type(self._model).__name__} already, and both will "
                "be in its loss: detach() the first one unless that is meant",
                stacklevel=4,
            )

    def detach(self) -> None:
        """Leave the model as it was; without effect when not attached. What was read last stays."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._listener is not None:
            self._listener.release()
            self._listener = None
        if self.trained_routing is not None:
            self.trained_routing.detach()

    def __enter__(self) -> "Attachment":
        return self.attach()

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def _note_call(self, *_: Any) -> None:
        self._called = True
        if self._listener is not None:
            self._listener.expect()

    def _check_call(self, router: nn.Module, *_: Any) -> None:
        """Raise if a model is trained without being called itself, which would train without the term."""
        if not self._called and router.training and torch.is_grad_enabled():
            raise RuntimeError(
                f"a router ran in training outside of a forward of the {type(self._model).__name__} that the "
                "consistency term is attached to, so the term is in no loss: attach to the module that is called "
                "(after wrapping it)"
            )

    @torch.compiler.disable  # it would be compiled in twenty pieces
    def _add_term(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        assert self._listener is not None
        try:
            if not (model.training and torch.is_grad_enabled()):
                return None
            given = named_arguments(model, args, kwargs)
            trace = self._listener.trace(given)
        finally:
            self._listener.done()
        term = Term.of(self.loss, trace, self.weight)
        self.term, self._layer_names = term.detach(), tuple(trace.layer_names or ())
        return self._join(output, term, trace, given)

    def _join(self, output: Any, term: Term, trace: RoutingTrace, given: Mapping[str, Any]) -> Any:
        """Return the output of a forward, with the term beside what is trained of it."""
        kind = type(self._model).__name__
        if self._scale is None:
            return add_to_loss(output, term.weighted, self._factors, given, kind)
        try:
            return carry(output, term.weighted, self._scale)
        except LookupError:
            raise RuntimeError(
                f"{kind} returned nothing in training that has a gradient, got {type(output).__name__} from "
                f"{sorted(given)}: the consistency term joins the backward pass through what the model returns"
            ) from None


def attachments(model: nn.Module) -> list[Attachment]:
    """Return the attachments that add a term to the model's loss now."""
    owners = [hook.owner for hook in model._forward_hooks.values() if isinstance(hook, OwnedHook)]
    return [owner for owner in owners if isinstance(owner, Attachment)]


def _check_scale(scale: Any) -> Scale | None:
    if scale is None:
        return None
    if isinstance(scale, Real) and 0 < float(scale) < math.inf:
        return partial(operator.mul, float(scale))
    if not callable(scale):
        raise ValueError(f"scale must be a finite number > 0, or a function of 1, got {scale!r}")
    return scale
