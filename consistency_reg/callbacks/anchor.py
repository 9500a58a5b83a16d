"""The anchor to the routers before fine-tuning as a Lightning callback."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from consistency_reg.capture import RouterAdapter, RouterCapture
from consistency_reg.losses import RouterAnchorLoss
from consistency_reg.masks import Masks, batch_masks
from consistency_reg.optional import require
from consistency_reg.term import Term, WeightSchedule

with require("lightning"):
    from lightning.pytorch import Callback, LightningModule, Trainer


class RouterAnchor(Callback):
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
        RuntimeError: manual optimization; a ``training_step`` that does not return a tensor.

    Example:
        >>> RouterAnchor(weight=-1.0)
        Traceback (most recent call last):
        ValueError: weight must be a finite number >= 0, got -1.0
    """

    def __init__(
        self,
        weight: float = 0.0,
        *,
        masks: Callable[[Any], Masks] | None = None,
        adapters: Sequence[RouterAdapter] = (),
    ) -> None:
        self.weight = WeightSchedule(weight).weight
        self.masks = masks or batch_masks
        self.adapters = tuple(adapters)
        self.loss: RouterAnchorLoss | None = None
        self._capture: RouterCapture | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Copy the routers, before a checkpoint brings back what they have learned."""
        if stage == "fit" and self.weight:
            self.loss = RouterAnchorLoss(RouterCapture(pl_module, self.adapters).frozen_routers())

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wrap ``training_step``."""
        if self.loss is None:
            return
        if not pl_module.automatic_optimization:
            raise RuntimeError(
                f"RouterAnchor adds its term to the loss that training_step returns, but {type(pl_module).__name__} "
                "uses manual optimization: call consistency_reg.RouterAnchorLoss in training_step instead"
            )
        self._capture = RouterCapture(pl_module, self.adapters, keep_inputs=True).attach()
        original = pl_module.training_step

        @functools.wraps(original)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            assert self._capture is not None
            with self._capture.recording():
                output = original(*args, **kwargs)
            return output if output is None else self._add_term(pl_module, output, args[0] if args else None)

        pl_module.training_step = training_step  # type: ignore[method-assign]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give ``training_step`` back."""
        self._release(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give ``training_step`` back."""
        self._release(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The routers before fine-tuning."""
        return {} if self.loss is None else {"loss": self.loss.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        if self.loss is not None and "loss" in state_dict:
            self.loss.load_state_dict(state_dict["loss"])

    def _add_term(self, pl_module: LightningModule, output: Any, batch: Any) -> Any:
        if isinstance(output, dict) and isinstance(output.get("loss"), Tensor):
            return {**output, "loss": self._add_term(pl_module, output["loss"], batch)}
        if not isinstance(output, Tensor):
            raise RuntimeError(
                f"training_step must return its loss, as a tensor or under 'loss', got {type(output).__name__}"
            )
        assert self._capture is not None
        assert self.loss is not None
        term = Term.of(self.loss, self._capture.trace(*self.masks(batch)), self.weight)
        self._capture.clear()
        pl_module.log_dict({f"train/anchor/{name}": value for name, value in term.logged().items()})
        return output + term.weighted.to(output.dtype)

    def _release(self, pl_module: LightningModule) -> None:
        if self._capture is None:
            return
        self._capture.detach()
        self._capture = None
        pl_module.__dict__.pop("training_step", None)
