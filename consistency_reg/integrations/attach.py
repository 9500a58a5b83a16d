"""The consistency term in the loss that a model itself returns, whoever trains it."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from consistency_reg.capture import RouterAdapter, RouterCapture
from consistency_reg.hooks import OwnedHook
from consistency_reg.integrations.fused_head import carry, is_fused
from consistency_reg.integrations.outputs import change_loss
from consistency_reg.losses import RoutingLoss
from consistency_reg.masks import Masks, batch_masks, named_arguments
from consistency_reg.term import Term, check_loss, check_weight, warn_of_frozen


def attach(
    model: nn.Module,
    loss: RoutingLoss | None = None,
    weight: float = 0.35,
    *,
    masks: Callable[[Mapping[str, Any]], Masks] | None = None,
    adapters: Sequence[RouterAdapter] = (),
    keep_inputs: bool = False,
    layers: str | None = None,
) -> "Attachment":
    """Make ``model`` return ``loss + weight * term`` for its loss, in training, until the handle is detached.

    This serves whatever trains ``model(**batch).loss``: a loop of your own, accelerate, transformers' ``Trainer``,
    TRL's ``SFTTrainer``. Only forwards in training mode with autograd get the term; evaluation and generation are as
    they were. The model keeps its class, its parameters and its files; a copy or a pickle of it is free of the term.

    Attach to the model that is called: after PEFT has wrapped it, before ``torch.compile``; before or after
    accelerate, DDP and FSDP2.

    Args:
        model: returns a loss in training (given labels), and holds routers.
        loss: any :class:`~consistency_reg.losses.RoutingLoss`; ``LocalConsistencyLoss()`` when None.
        weight: weight of the term, >= 0; may be set on the handle later.
        masks: ``forward's arguments by name -> (valid, document_ids)``, each [B, T] or None; reads ``attention_mask``
            and ``document_ids`` or ``position_ids`` when None.
        adapters: kinds of routers that the capture does not know by itself.
        keep_inputs: capture the routers' inputs too, which :class:`~consistency_reg.RouterAnchorLoss` needs.
        layers: regular expression, the routers to capture; all when None.

    Returns:
        the :class:`Attachment`, which is a context manager as well.

    Raises:
        ValueError: a negative or non-finite weight; a model without routers.
        RuntimeError: in a training forward: no loss (no labels), a term without gradient (reentrant checkpointing).

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
    return Attachment(
        model, loss, weight, masks=masks, adapters=adapters, keep_inputs=keep_inputs, layers=layers
    ).attach()


class Attachment:
    """What :func:`attach` returns: the term of one model, to read, to re-weight and to detach.

    A trainer that passes ``num_items_in_batch`` adds up the losses of an optimizer step's micro-batches instead of
    averaging them. There the term of a micro-batch counts by its share of the predicted tokens, as the cross-entropy
    does, so that the shares of a step add up to 1; or, where :attr:`summed` is set, by ``1 / summed``.

    Attributes:
        loss: the routing loss.
        summed: how many losses the trainer adds up for one step when it passes ``num_items_in_batch``, or None.
        term: the :class:`~consistency_reg.term.Term` of the last training forward, without its graph, or None.
        during: the one training that it is for, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: RoutingLoss | None = None,
        weight: float = 0.35,
        *,
        masks: Callable[[Mapping[str, Any]], Masks] | None = None,
        adapters: Sequence[RouterAdapter] = (),
        keep_inputs: bool = False,
        layers: str | None = None,
    ) -> None:
        self.loss = check_loss(loss)
        self.weight = weight
        self.summed: int | None = None
        self.term: Term | None = None
        self.during: Any = None
        self._model = model
        self._masks = masks or batch_masks
        self._capture = RouterCapture(model, adapters, keep_inputs=keep_inputs, layers=layers)
        self._handles: list[RemovableHandle] = []
        self._called = False
        warn_of_frozen(self._capture)

    @property
    def weight(self) -> float:
        """The weight of the term from the next forward on."""
        return self._weight

    @weight.setter
    def weight(self, weight: float) -> None:
        self._weight = check_weight(weight)

    @property
    def value(self) -> float:
        """The raw term of the last training forward, a mean over layers; NaN before the first."""
        return float("nan") if self.term is None else self.term.value.item()

    @property
    def per_layer(self) -> dict[str, float]:
        """The raw term of the last training forward by the router's name; empty before the first."""
        return (
            {} if self.term is None else dict(zip(self._capture.layer_names, self.term.per_layer.tolist(), strict=True))
        )

    def attach(self) -> "Attachment":
        """Add the term from the next forward on; without effect when attached already."""
        if self._handles:
            return self
        if any(type(other.loss) is type(self.loss) for other in attachments(self._model)):
            warnings.warn(
                f"a {type(self.loss).__name__} is attached to this {type(self._model).__name__} already, and both will "
                "be in its loss: detach() the first one unless that is meant",
                stacklevel=3,
            )
        self._called = False
        self._capture.attach()  # before our own hook: at the end of a forward it hears first
        router = next(iter(self._capture.routers.values()))
        self._handles = [
            self._model.register_forward_pre_hook(OwnedHook(self, "_note_call")),
            self._model.register_forward_hook(OwnedHook(self, "_add_term"), with_kwargs=True),
            router.register_forward_hook(OwnedHook(self, "_check_call")),
        ]
        return self

    def detach(self) -> None:
        """Leave the model as it was; without effect when not attached. What was read last stays."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._capture.detach()

    def __enter__(self) -> "Attachment":
        return self.attach()

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def _note_call(self, *_: Any) -> None:
        self._called = True

    def _check_call(self, router: nn.Module, *_: Any) -> None:
        """A model that is trained without being called itself would silently train without the term."""
        if not self._called and router.training and torch.is_grad_enabled():
            raise RuntimeError(
                f"a router ran in training outside of a forward of the {type(self._model).__name__} that the "
                "consistency term is attached to, so the term is in no loss: attach to the module that is called "
                "(after wrapping it)"
            )

    @torch.compiler.disable  # it would be compiled in twenty pieces
    def _add_term(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not (model.training and torch.is_grad_enabled()):
            self._capture.clear()
            return None
        given = named_arguments(model, args, kwargs)
        trace = self._capture.trace(*self._masks(given))
        self._capture.clear()
        term = Term.of(self.loss, trace, self.weight)
        self.term = term.detach()
        try:
            if is_fused(given):
                output.log_probs = carry(output.log_probs, output.label_mask, term.weighted)
            weighted = term.weighted * self._share(model, given)
            return change_loss(output, lambda loss: loss + weighted.to(loss))
        except LookupError:
            raise RuntimeError(
                f"{type(model).__name__} returned no loss in training that the consistency term could be added to: "
                f"give it labels (it was given {sorted(given)}). Where the loss is computed outside of the model, add "
                "weight * LocalConsistencyLoss()(RouterCapture(model).trace()) to it there"
            ) from None

    def _share(self, model: nn.Module, given: Mapping[str, Any]) -> Tensor | float:
        """The factor by which this micro-batch counts in the sum or mean that the trainer takes."""
        items = given.get("num_items_in_batch")
        if items is None:
            return 1.0
        if self.summed is not None:
            return 1.0 / self.summed
        targets = given.get("shift_labels")
        if targets is None:
            targets = given["labels"]
            encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
            targets = targets if encoder_decoder else targets[..., 1:]  # a causal model's first label has no past
        return (targets != -100).sum() / torch.as_tensor(items, device=targets.device)


def attachments(model: nn.Module) -> list[Attachment]:
    """Those that add a term to the model's loss now."""
    owners = [hook.owner for hook in model._forward_hooks.values() if isinstance(hook, OwnedHook)]
    return [owner for owner in owners if isinstance(owner, Attachment)]
