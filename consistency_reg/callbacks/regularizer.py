"""The consistency term as a Lightning callback."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from consistency_reg.callbacks.controller import GoalKeeper
from consistency_reg.capture import RouterAdapter, RouterCapture
from consistency_reg.goals import make_goal
from consistency_reg.losses import LocalConsistencyLoss, RoutingLoss
from consistency_reg.masks import Masks, batch_masks
from consistency_reg.optional import require
from consistency_reg.term import Term, WeightSchedule, warn_of_frozen

with require("lightning"):
    from lightning.pytorch import Callback, LightningModule, Trainer


class ConsistencyRegularizer(Callback):
    """Adds ``weight(step) * loss(routing)`` to the loss that ``training_step`` returns; the module stays as it is.

    Logs, at the steps that the trainer logs, ``train/consistency/loss`` (raw), ``/weight``, ``/weighted`` and the raw
    value of each layer as ``/layer_00``, ....

    Args:
        loss: any :class:`~consistency_reg.losses.RoutingLoss`; ``LocalConsistencyLoss()`` when None.
        weight: weight of the term, >= 0.
        warmup_steps: optimizer steps over which the weight rises linearly from 0.
        start_step: optimizer step at which the term, and its warm-up, begins.
        masks: ``batch -> (valid, document_ids)``, each [B, T] or None; reads the usual keys of a mapping when None.
        adapters: kinds of routers that the capture does not know by itself.
        target: ``{"srp/m16": 0.7}``: the weight is moved so that this measure becomes at least this. ``srp/mN`` is
            measured on training batches, all layers together, as the monitor does on validation; measures of
            validation are ``val/srp/m16``, ``val/cache/lru_25pct`` and their like, and move the weight when they are
            logged.
        budget: ``{"ce": 0.005}``: the weight is moved so that this logged loss (``ce`` is ``train/ce``) is 0.5% above
            what it was at the same step of a reference run, a run of the same recipe and seed without the term.
            Training losses compare at the steps that the reference logged; ``val/ce`` is steadier, and rarer.
        reference: that run's folder, or a CSV or JSON of ``step`` and the loss.
        max_weight: the weight stays within 0 and this, with a target or a budget; three times ``weight`` when None.
        response_steps: optimizer steps in which the weight answers, with a target or a budget; 100 when None. Not
            shorter than routing takes to answer a change of the weight.

    With a target or a budget ``weight`` is where the weight begins, and the goal counts from the end of the warm-up
    on. ``train/consistency/target``, ``/measured`` (smoothed) and ``/violation`` are logged too. A goal that cannot
    be met is reported once, and the weight stays at its limit. How the weight is moved:
    :class:`consistency_reg.control.WeightController`.

    Raises:
        ValueError: a negative or non-finite weight; a model without routers (at the start of ``fit``).
        RuntimeError: manual optimization; a ``training_step`` that returns no loss; a term without gradient; a goal
            whose measure is not logged.
        FileNotFoundError: no such reference (at the start of ``fit``).

    Example:
        >>> callback = ConsistencyRegularizer(weight=0.3, warmup_steps=100)
        >>> callback.weight_at(50)
        0.15
    """

    def __init__(
        self,
        loss: RoutingLoss | None = None,
        weight: float = 0.3,
        warmup_steps: int = 0,
        *,
        start_step: int = 0,
        masks: Callable[[Any], Masks] | None = None,
        adapters: Sequence[RouterAdapter] = (),
        target: dict[str, float] | None = None,
        budget: dict[str, float] | None = None,
        reference: str | None = None,
        max_weight: float | None = None,
        response_steps: int | None = None,
    ) -> None:
        self.loss = LocalConsistencyLoss() if loss is None else loss
        self.schedule = WeightSchedule(weight, warmup_steps, start_step)
        self.masks = masks or batch_masks
        self.adapters = tuple(adapters)
        self.goal_keeper: GoalKeeper | None = None
        if (goal := make_goal(target, budget, reference)) is not None:
            self.goal_keeper = GoalKeeper(
                goal,
                weight,
                max_weight=max_weight,
                response_steps=100 if response_steps is None else response_steps,
                first_step=start_step + warmup_steps,
            )
        elif max_weight is not None or response_steps is not None:
            raise ValueError("max_weight and response_steps need a target or a budget, got neither")
        self._capture: RouterCapture | None = None

    def weight_at(self, step: int) -> float:
        """The weight at an optimizer step, by what has been measured so far where there is a target or a budget."""
        factor = 1.0 if self.goal_keeper is None else self.goal_keeper.factor
        return factor * self.schedule.at(step)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the routers and wrap ``training_step``."""
        if not pl_module.automatic_optimization:
            raise RuntimeError(
                "ConsistencyRegularizer adds its term to the loss that training_step returns, but "
                f"{type(pl_module).__name__} uses manual optimization: call "
                "consistency_reg.LocalConsistencyLoss on RouterCapture(model).trace() in training_step instead"
            )
        self._capture = RouterCapture(pl_module, self.adapters).attach()
        warn_of_frozen(self._capture)
        if self.goal_keeper is not None:
            self.goal_keeper.on_fit_start()
        self.loss.to(pl_module.device)
        original = pl_module.training_step

        @functools.wraps(original)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            assert self._capture is not None
            with self._capture.recording():
                output = original(*args, **kwargs)
            return output if output is None else self._add_term(trainer, pl_module, output, args[0] if args else None)

        pl_module.training_step = training_step  # type: ignore[method-assign]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget what moved the weight in an earlier run."""
        if self.goal_keeper is not None:
            self.goal_keeper.on_train_start(trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        """Move the weight by a training loss, if that is its goal."""
        if self.goal_keeper is not None:
            self.goal_keeper.on_logged(trainer, "training")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move the weight by a measure of validation, if that is its goal."""
        if self.goal_keeper is not None and self._capture is not None and not trainer.sanity_checking:
            self.goal_keeper.on_logged(trainer, "validation")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give ``training_step`` back."""
        self._release(pl_module)
        if self.goal_keeper is not None:
            self.goal_keeper.on_fit_end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give ``training_step`` back."""
        self._release(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The state of the loss, and of what moves the weight."""
        keeper = self.goal_keeper
        return {"loss": self.loss.state_dict()} | ({} if keeper is None else {"goal_keeper": keeper.state_dict()})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.loss.load_state_dict(state_dict["loss"])
        if self.goal_keeper is not None and "goal_keeper" in state_dict:
            self.goal_keeper.load_state_dict(state_dict["goal_keeper"])

    def _add_term(self, trainer: Trainer, pl_module: LightningModule, output: Any, batch: Any) -> Any:
        if isinstance(output, Mapping):
            if not isinstance(output.get("loss"), Tensor):
                raise RuntimeError(f"training_step must return its loss under the key 'loss', got keys {list(output)}")
            return {**output, "loss": self._add_term(trainer, pl_module, output["loss"], batch)}
        if not isinstance(output, Tensor):
            raise RuntimeError(f"training_step must return its loss, got {type(output).__name__}")
        assert self._capture is not None
        trace = self._capture.trace(*self.masks(batch))
        self._capture.clear()
        if self.goal_keeper is not None:
            self.goal_keeper.on_training_trace(trainer.global_step, trace)
        term = Term.of(self.loss, trace, self.weight_at(trainer.global_step))
        logged = term.logged() | ({} if self.goal_keeper is None else self.goal_keeper.logged())
        pl_module.log_dict({f"train/consistency/{name}": value for name, value in logged.items()})
        return output + term.weighted.to(output.dtype)

    def _release(self, pl_module: LightningModule) -> None:
        if self._capture is None:
            return
        self._capture.detach()
        self._capture = None
        pl_module.__dict__.pop("training_step", None)
