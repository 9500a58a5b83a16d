"""Add the consistency term to training as a Lightning callback."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from consistency_reg.callbacks.goal_keeper import GoalKeeper
from consistency_reg.callbacks.loggers import log_settings
from consistency_reg.callbacks.monitor import RoutingMonitor
from consistency_reg.callbacks.trainer_state import callbacks_of, warn_of_late_start
from consistency_reg.callbacks.training_step import TrainingStepTerm
from consistency_reg.capture import RouterAdapter
from consistency_reg.control import make_goal
from consistency_reg.losses import LocalConsistencyLoss, RouterAnchorLoss, RoutingLoss
from consistency_reg.masks import Masks
from consistency_reg.optional import require
from consistency_reg.routing import RoutingTrace
from consistency_reg.session import Listener, ListenOptions, Which
from consistency_reg.term import Term, WeightSchedule, check_loss, check_name, usual_name, warn_of_frozen
from consistency_reg.tracking.settings import plain_settings

with require("lightning"):
    from lightning.pytorch import LightningModule, Trainer


class ConsistencyRegularizer(TrainingStepTerm):
    """Adds ``weight(step) * loss(routing)`` to the loss that ``training_step`` returns; the module stays as it is.

    Logs, at the steps that the trainer logs, ``train/consistency/loss`` (raw), ``/weight``, ``/weighted`` and the raw
    value of each layer as ``/layer_00``, ....

    Args:
        loss: any :class:`~consistency_reg.losses.RoutingLoss`; ``LocalConsistencyLoss()`` when None.
        weight: weight of the term, >= 0.
        warmup_steps: optimizer steps over which the weight rises linearly from 0.
        start_step: optimizer step at which the term, and its warm-up, begins.
        end_step: optimizer step from which the weight is 0 again; never when None.
        cooldown_steps: optimizer steps before ``end_step`` over which the weight falls linearly to 0.
        masks: ``batch -> (valid, document_ids)``, each [B, T] or None; reads what the model is called with, and the
            usual keys of the batch, when None (docs/tokens.md).
        adapters: kinds of routers that the capture does not know by itself.
        layers: regular expression on the routers' names; those that ran with gradient and belong to what the optimizer
            trains when None.
        tokens: "labels": only tokens that have a label count (docs/tokens.md); "all": all that are no padding.
        name: of the term in the log, ``train/NAME/...``, and in checkpoints; "consistency", or for other losses
            "balance", "z" or "anchor", when None. A trainer may have any number of terms: a second of a name is logged
            as ``NAME_2``, and terms that differ in nothing but their weight need names.
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
        >>> callback = ConsistencyRegularizer(weight=0.35, warmup_steps=100)
        >>> callback.weight_at(50)
        0.175
    """

    name = "consistency"
    by_hand = "call consistency_reg.LocalConsistencyLoss on RouterCapture(model).trace()"

    def __init__(
        self,
        loss: RoutingLoss | None = None,
        weight: float = 0.35,
        warmup_steps: int = 0,
        *,
        start_step: int = 0,
        end_step: int | None = None,
        cooldown_steps: int | None = None,
        masks: Callable[[Any], Masks] | None = None,
        adapters: Sequence[RouterAdapter] = (),
        layers: str | None = None,
        tokens: Which = "all",
        name: str | None = None,
        target: dict[str, float] | None = None,
        budget: dict[str, float] | None = None,
        reference: str | None = None,
        max_weight: float | None = None,
        response_steps: int | None = None,
    ) -> None:
        self.loss = check_loss(loss)
        keep_inputs = isinstance(self.loss, RouterAnchorLoss)
        options = ListenOptions(masks, adapters, layers, tokens, keep_inputs)
        super().__init__(options, check_name(name) or usual_name(self.loss))
        self.schedule = WeightSchedule(weight, warmup_steps, start_step, end_step, cooldown_steps)
        self.goal = {"target": target, "budget": budget, "reference": reference, "max_weight": max_weight}
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

    def weight_at(self, step: int) -> float:
        """Return the weight at an optimizer step; a target or a budget moves it by what has been measured so far."""
        factor = 1.0 if self.goal_keeper is None else self.goal_keeper.factor
        return factor * self.schedule.at(step)

    def term(self, step: int, trace: RoutingTrace) -> Term:
        """Return the loss of one forward with the weight of the step, which a goal may move before."""
        if self.goal_keeper is not None:
            self.goal_keeper.on_training_trace(step, trace)
        return Term.of(self.loss, trace, self.weight_at(step))

    def after_term(self, trainer: Trainer, term: Term, trace: RoutingTrace) -> None:
        """Let the monitors of the trainer see whether the term reaches the routers."""
        if term.weight:
            for monitor in callbacks_of(trainer, RoutingMonitor):
                monitor.watch_term(term.weighted, trace)

    @property
    def settings(self) -> dict[str, Any]:
        """Return the term as a recipe writes it: its loss with all options, weight, schedule and goal."""
        schedule = {name: value for name, value in asdict(self.schedule).items() if value is not None}
        goal = {name: value for name, value in self.goal.items() if value is not None}
        return {"loss": plain_settings(self.loss), **schedule, **goal}

    def logged_beside(self) -> dict[str, float]:
        """Return the goal, and how far it is kept."""
        return {} if self.goal_keeper is None else self.goal_keeper.logged()

    @property
    def state_key(self) -> str:
        """Return the key of the state in a checkpoint: by the loss and its options, the layers and the name."""
        options = {"loss": plain_settings(self.loss), "layers": self.options.layers, "name": self.name}
        usual = {"loss": plain_settings(LocalConsistencyLoss()), "layers": None, "name": type(self).name}
        return type(self).__qualname__ if options == usual else self._generate_state_key(**options)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the routers; put the settings into the config of the loggers' runs."""
        log_settings(trainer, self.logged_name, self.settings)
        super().on_fit_start(trainer, pl_module)
        if self.goal_keeper is not None:
            self.goal_keeper.on_fit_start()

    def on_listen(self, listener: Listener, pl_module: LightningModule) -> None:
        """Warn if no router learns, and move the loss to the module's device."""
        warn_of_frozen(listener)
        self.loss.to(pl_module.device)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget what moved the weight in an earlier run; warn if the term begins after the end of this one."""
        if self.schedule.weight:
            warn_of_late_start(trainer, "the consistency term", self.schedule.start_step)
        if self.goal_keeper is not None:
            self.goal_keeper.on_train_start(trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        """Move the weight by a training loss, if that is its goal."""
        if self.goal_keeper is not None:
            self.goal_keeper.on_logged(trainer, "training")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move the weight by a measure of validation, if that is its goal."""
        if self.goal_keeper is not None and self._listener is not None and not trainer.sanity_checking:
            self.goal_keeper.on_logged(trainer, "validation")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore ``training_step``, and warn if a goal was never measured."""
        super().on_fit_end(trainer, pl_module)
        if self.goal_keeper is not None:
            self.goal_keeper.on_fit_end()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the loss, and of what moves the weight."""
        keeper = self.goal_keeper
        return {"loss": self.loss.state_dict()} | ({} if keeper is None else {"goal_keeper": keeper.state_dict()})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from :meth:`state_dict`."""
        self.loss.load_state_dict(state_dict["loss"])
        if self.goal_keeper is not None and "goal_keeper" in state_dict:
            self.goal_keeper.load_state_dict(state_dict["goal_keeper"])
