"""Anchor routers to those before fine-tuning, as a Lightning callback."""

from collections.abc import Callable, Sequence
from typing import Any

from consistency_reg.callbacks.training_step import TrainingStepTerm
from consistency_reg.capture import RouterAdapter, RouterCapture
from consistency_reg.losses import RouterAnchorLoss
from consistency_reg.masks import Masks
from consistency_reg.optional import require
from consistency_reg.routing import RoutingTrace
from consistency_reg.session import Listener, ListenOptions, Which
from consistency_reg.term import Term, check_weight

with require("lightning"):
    from lightning.pytorch import LightningModule, Trainer


class RouterAnchor(TrainingStepTerm):
    """Adds ``weight * KL(router ‖ router before fine-tuning)`` to the loss that ``training_step`` returns.

    The routers before fine-tuning are those that the module has when ``fit`` sets up, or that its ``setup`` or
    ``configure_model`` makes; a run that is resumed keeps the ones that it began with. They are copies of the routers
    alone, fed with the present router's input: no second model. Logs ``train/anchor/loss`` (raw, in nats), ``/weight``,
    ``/weighted`` and each layer's raw value. With weight 0 nothing is copied, added or logged. See
    :class:`~consistency_reg.losses.RouterAnchorLoss`.

    Args:
        weight: weight of the term, >= 0.
        masks: see :class:`~consistency_reg.ConsistencyRegularizer`, as are adapters, layers and tokens.
        name: of the term in the log and in checkpoints; "anchor" when None.

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
        layers: str | None = None,
        tokens: Which = "all",
        name: str | None = None,
    ) -> None:
        super().__init__(ListenOptions(masks, adapters, layers, tokens, keep_inputs=True), name)
        self.weight = check_weight(weight)
        self.loss: RouterAnchorLoss | None = None
        self._resumed: dict[str, Any] | None = None  # of a checkpoint that was read before there were routers

    @property
    def state_key(self) -> str:
        """Return the key of the state in a checkpoint: by the layers and the name."""
        options = {"layers": self.options.layers, "name": self.name}
        usual = {"layers": None, "name": type(self).name}
        return type(self).__qualname__ if options == usual else self._generate_state_key(**options)

    def is_on(self) -> bool:
        """Return whether the weight is more than 0."""
        return self.weight > 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Copy the routers, if they are there, before a checkpoint brings back what they have learned."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self.is_on():
            self.loss = None
            try:
                capture = RouterCapture(pl_module, self.options.adapters, layers=self.options.layers)
            except ValueError:  # they come with the module's setup() or configure_model()
                return
            self.loss = RouterAnchorLoss(capture.frozen_routers())

    def on_listen(self, listener: Listener, pl_module: LightningModule) -> None:
        """Copy the routers if they have come since, unless a checkpoint holds those that the run began with."""
        if self.loss is None:
            self.loss = RouterAnchorLoss(listener.frozen_routers())
            if self._resumed is not None:
                self.loss.load_state_dict(self._resumed)
        self._resumed = None

    def term(self, step: int, trace: RoutingTrace) -> Term:
        """Return the divergence of one forward from the routers before fine-tuning."""
        assert self.loss is not None
        return Term.of(self.loss, trace, self.weight)

    def state_dict(self) -> dict[str, Any]:
        """Return the routers before fine-tuning."""
        return {} if self.loss is None else {"loss": self.loss.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from :meth:`state_dict`."""
        if self.is_on() and "loss" in state_dict:
            if self.loss is None:
                self._resumed = state_dict["loss"]
            else:
                self.loss.load_state_dict(state_dict["loss"])
