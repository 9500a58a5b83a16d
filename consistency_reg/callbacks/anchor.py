"""The anchor to the routers before fine-tuning as a Lightning callback."""

from collections.abc import Callable, Sequence
from typing import Any

from consistency_reg.callbacks.training_step import TrainingStepTerm
from consistency_reg.capture import RouterAdapter, RouterCapture
from consistency_reg.losses import RouterAnchorLoss
from consistency_reg.masks import Masks
from consistency_reg.optional import require
from consistency_reg.routing import RoutingTrace
from consistency_reg.term import Term, check_weight

with require("lightning"):
    from lightning.pytorch import LightningModule, Trainer


class RouterAnchor(TrainingStepTerm):
    """Adds ``weight * KL(router ‖ router before fine-tuning)`` to the loss that ``training_step`` returns.

    The routers before fine-tuning are those that the module has when ``fit`` sets up; a run that is resumed keeps the
    ones that it began with. They are copies of the routers alone, fed with the present router's input: no second
    model. Logs ``train/anchor/loss`` (raw, in nats), ``/weight``, ``/weighted`` and each layer's raw value. With
    weight 0 nothing is copied, added or logged. See :class:`~consistency_reg.losses.RouterAnchorLoss`.

    Args:
        weight: weight of the term, >= 0.
        masks: ``batch -> (valid, document_ids)``, each [B, T] or None; reads the usual keys of a mapping when None.
        adapters: kinds of routers that the capture does not know by itself.

    Raises:
        ValueError: a negative or non-finite weight; a model without routers (when ``fit`` begins).
        RuntimeError: manual optimization; a ``training_step`` that returns no loss.

    Example:
        >>> RouterAnchor(weight=-1.0)
        Traceback (most recent call last):
        ValueError: weight must be a finite number >= 0, got -1.0
    """

    name = "anchor"
    by_hand = "call consistency_reg.RouterAnchorLoss"

    def __init__(
        self,
        weight: float = 0.0,
        *,
        masks: Callable[[Any], Masks] | None = None,
        adapters: Sequence[RouterAdapter] = (),
    ) -> None:
        super().__init__(masks, adapters)
        self.weight = check_weight(weight)
        self.loss: RouterAnchorLoss | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Copy the routers, before a checkpoint brings back what they have learned."""
        if stage == "fit" and self.weight:
            self.loss = RouterAnchorLoss(RouterCapture(pl_module, self.adapters).frozen_routers())

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wrap ``training_step``."""
        if self.loss is not None:
            self._wrap(trainer, pl_module, keep_inputs=True)

    def term(self, step: int, trace: RoutingTrace) -> Term:
        """The divergence of one forward from the routers before fine-tuning."""
        assert self.loss is not None
        return Term.of(self.loss, trace, self.weight)

    def state_dict(self) -> dict[str, Any]:
        """The routers before fine-tuning."""
        return {} if self.loss is None else {"loss": self.loss.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        if self.loss is not None and "loss" in state_dict:
            self.loss.load_state_dict(state_dict["loss"])
