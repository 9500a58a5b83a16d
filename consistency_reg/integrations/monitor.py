"""Measure routing in transformers' Trainer and in TRL's trainers."""

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from consistency_reg.capture import RouterAdapter
from consistency_reg.integrations.attach import attachments
from consistency_reg.integrations.deployed import DeployedEvaluation
from consistency_reg.integrations.evaluation import EvaluationProgress
from consistency_reg.integrations.listening import ForwardListener, Given
from consistency_reg.integrations.optimizer_step import StepTerm
from consistency_reg.integrations.reporters import ReporterBoard
from consistency_reg.integrations.trainer_state import (
    check_boundaries,
    checkpoint_of,
    join_before_reporters,
    will_log,
)
from consistency_reg.masks import Masks
from consistency_reg.masks.hints import told_boundaries
from consistency_reg.optional import require
from consistency_reg.rerouting import RoutingSchedule
from consistency_reg.routing import RoutingTrace
from consistency_reg.session import ListenOptions, Which
from consistency_reg.tracking.alarms import Alarms
from consistency_reg.tracking.monitor import MonitorCore

with require("accelerate"):
    import accelerate  # noqa: F401  (the Trainer needs it, and names it less clearly)
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

STATE_FILE = "routing_monitor.json"
RUNTIME = "_runtime"  # what every evaluation logs, behind its prefix


class RoutingMonitorCallback(TrainerCallback):
    """Measures routing in a ``Trainer``'s evaluations and at the training steps that it logs.

    The measures are those of :class:`~consistency_reg.RoutingMonitor`, with the names of transformers: of an evaluation
    ``eval_srp/m16``, ``eval_static_srp``, ``eval_cache/lru_2k``, ``eval_balance/cv``, ..., of each layer with
    ``/layer_00`` behind, and of each dataset, where ``eval_dataset`` is a mapping, with its name behind; of a training
    step ``srp/m16``, ``static_srp``, ``local_gain/m16``, ``cache/lru_2k``, ..., and ``tokens``, those seen so far.
    Reporters write them below ``eval/`` and ``train/``; wandb also gets tables of all experts and datasets, pictures
    (extra ``plots``) and ``best/`` in its summary, TensorBoard the pictures. A router that collapses is warned of once,
    and wandb's user is alerted.

    Where the model is trained with cache-aware routing (``ConsistencyCallback(routing=...)``), or ``deployed`` is
    given, each batch of an evaluation is run once more with it: ``eval_deployed/srp/m16``, ``.../cache/lru_2k`` and so
    on of the model, ``eval_deployed/loss`` where the model returns a loss, ``/agreement`` (the share of the chosen
    experts that the routers prefer by themselves), ``/strength`` and ``/cache_ratio``.

    :meth:`add_to` puts the callback before the reporters and tells it the names of the datasets.

    Args:
        segment_lengths: see :class:`~consistency_reg.RoutingMonitor`, as are the ratios, shares, samples and alarms.
        masks: ``forward's arguments by name -> (valid, document_ids)``, each [B, T] or None; reads what the
            model and those inside of it are called with when None (docs/tokens.md).
        adapters: kinds of routers that the capture does not know by itself.
        layers: regular expression on the routers' names; those that are trained when None.
        tokens: "labels": only tokens that have a label count; "all": all that are no padding.
        quality: the logged metric of an evaluation, lower is better, that the trade-off and ``best/`` are about;
            ``eval_loss`` when None.
        training: measure training steps too.
        deployed: the routing of ``eval_deployed/``, with the mean of its cache ratios; that of the training when None.
            ``RoutingSchedule(0.0)`` leaves these evaluations out.

    Raises:
        ValueError: ratios that are not positive, shares outside of (0, 1]; a model without routers.

    Example:
        >>> RoutingMonitorCallback(segment_lengths=(4, 16)).tokens
        0
    """

    def __init__(
        self,
        segment_lengths: Sequence[int] = (4, 16, 64),
        cache_ratios: Sequence[float] = (1.0, 2.0),
        cache_shares: Sequence[float] = (0.25,),
        *,
        masks: Callable[[Mapping[str, Any]], Masks] | None = None,
        adapters: Sequence[RouterAdapter] = (),
        layers: str | None = None,
        tokens: Which = "all",
        quality: str | None = None,
        training: bool = True,
        deployed: RoutingSchedule | None = None,
        samples: int = 2,
        alarms: Alarms | None = None,
    ) -> None:
        if deployed is not None and not isinstance(deployed, RoutingSchedule):
            raise TypeError(f"deployed must be a RoutingSchedule, such as RoutingSchedule(0.1), got {deployed!r}")
        self.core = MonitorCore(
            segment_lengths, cache_ratios, cache_shares, quality=quality, samples=samples, alarms=alarms
        )
        self.training = training
        self.deployed = deployed
        self._deployed: DeployedEvaluation | None = None
        self._options = ListenOptions(masks, adapters, layers, tokens)
        self._trainer: Trainer | None = None
        self._listener: ForwardListener | None = None
        self._tokens: Tensor | int = 0
        self._processes = 1
        self._records = False  # whether the present training step will be logged
        self._of_step: RoutingTrace | None = None
        self._of_batch: tuple[RoutingTrace, Given] | None = None
        self._evaluation = EvaluationProgress()
        self._logged: dict[str, float] = {}
        self._training_values: dict[str, float] = {}
        self._said = False

    @property
    def tokens(self) -> int:
        """Count the real tokens seen in training by all processes, which are taken to see equally many."""
        return int(self._tokens)

    def usage_profile(self) -> str:
        """Return a line ``layer expert count`` for each expert, of the last evaluation over all processes and datasets.

        See :meth:`consistency_reg.RoutingMonitor.usage_profile`.

        Raises:
            RuntimeError: no evaluation was measured.
        """
        return self.core.usage_profile()

    def add_to(self, trainer: Trainer) -> "RoutingMonitorCallback":
        """Join the trainer's callbacks before its reporters, so that they log the measures too."""
        join_before_reporters(trainer, self)
        self._trainer = trainer
        return self

    @contextmanager
    def listening(self, model: nn.Module) -> Iterator[None]:
        """Measure what is evaluated inside, for evaluations outside of ``train()``."""
        self._listen(model)
        try:
            yield
        finally:
            self._release()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Listen to the model; resume from a checkpoint, or forget another training."""
        self._processes = args.world_size
        if state.global_step == 0 and self.tokens:
            self._tokens = 0
            self.core.begin_anew()
        self._listen(model)
        saved = checkpoint_of(args, state) / STATE_FILE
        if state.global_step and saved.exists():
            kept = json.loads(saved.read_text(encoding="utf-8"))
            self._tokens = kept["tokens"]
            self.core.load_state_dict(kept)

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Decide whether the step is measured, and forget an evaluation that was not finished."""
        if self._evaluation.begun:
            self._begin_evaluation()
            self.core.reset()
        self._records = self.training and will_log(args, state, train_dataloader)
        for term in attachments(model):
            if isinstance(term, StepTerm):
                term.watch = self.core.watch_term if self._records else None

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Measure the last forward of a step that will be logged."""
        if self._of_step is not None:
            trace, self._of_step = self._of_step, None
            values = self.core.training_step(trace)
            self._training_values = {name: float(value) for name, value in values.items()}

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        """Count a batch of an evaluation."""
        if self._listener is None:
            self._say_that_nothing_is_measured()
        if self._of_batch is None:
            return
        (trace, given), self._of_batch = self._of_batch, None
        token_ids = given.get("input_ids")
        token_ids = token_ids if isinstance(token_ids, Tensor) else None
        board = self._board(args, state)
        if board.shows_pictures:
            self.core.draw(board, getattr(processing_class, "decode", None))
        evaluation = self._evaluation
        domain, name, draw = evaluation.dataset, evaluation.name(self._eval_datasets), evaluation.batches == 0
        self.core.validation_batch(trace, domain, name=name, token_ids=token_ids, draw=draw, board=board)
        evaluation.batches += 1
        if self._deployed is not None:
            self._deployed.evaluate(given, domain)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the measures to the log of a training step, or of an evaluation when all of its datasets are done."""
        if logs is None:
            return
        prefix = next((name.removesuffix(RUNTIME) for name in logs if name.endswith(RUNTIME)), None)
        if prefix is None and "loss" in logs and self._training_values:
            values = self._training_values | {"tokens": float(self.tokens)}
            self._training_values = {}
        elif prefix is not None and prefix != "train":
            values = self._end_dataset(prefix, logs, args.device)
        else:
            return
        logs |= values
        if state.log_history:
            state.log_history[-1] |= values

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Show what goes with the numbers: alarms, the trade-off with the quality, its best, tables, pictures."""
        if self._logged:
            logged, self._logged = self._logged, {}
            self.core.show(
                self._board(args, state),
                logged,
                step=state.global_step,
                tokens=self.tokens,
                first=state.is_world_process_zero,
            )

    def on_predict(self, *_: Any, **__: Any) -> None:
        """Forget what was heard of a prediction, which is no evaluation."""
        self._begin_evaluation()
        self.core.reset()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep the tokens seen and the best evaluation in the checkpoint."""
        folder = checkpoint_of(args, state)
        if args.should_save and folder.exists():
            kept = {"tokens": self.tokens} | self.core.state_dict()
            written = folder / f".{STATE_FILE}"
            written.write_text(json.dumps(kept), encoding="utf-8")
            written.replace(folder / STATE_FILE)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Take the hooks off the model."""
        self._release()

    # --- hearing ----------------------------------------------------------------------------------------------------

    def _listen(self, model: nn.Module) -> None:
        self._release()
        self._model = model
        self._told: dict[str, tuple[str, ...]] = {}
        self._listener = ForwardListener(model, self._hear, self._options)
        self._deployed = DeployedEvaluation(model, self.deployed, self.core.new_measures(), self._options)

    def _hear(self, given: Given) -> None:
        assert self._listener is not None
        assert self._deployed is not None
        if self._deployed.running:
            self._deployed.hear(self._listener.trace(given))
            return
        learns = torch.is_grad_enabled()
        if self._options.masks is None and self._trainer is not None:
            which = "train_dataset" if self._model.training else "eval_dataset"
            check_boundaries(self._boundaries(which), given)
        if self._model.training and learns:
            self._tokens = self._tokens + self._listener.count_tokens(given) * self._processes
            if self._records:
                self._of_step = self._listener.trace(given)
        elif not self._model.training and not learns and self._of_batch is None:
            self._of_batch = self._listener.trace(given), given  # a second forward of the same batch is not counted

    def _boundaries(self, which: str) -> tuple[str, ...]:
        """Return the columns of the trainer's datasets that tell where documents begin, looked at once."""
        if which not in self._told:
            dataset = getattr(self._trainer, which, None)
            datasets = list(dataset.values()) if isinstance(dataset, dict) else [dataset]
            self._told[which] = tuple(dict.fromkeys(name for one in datasets for name in told_boundaries(one)))
        return self._told[which]

    def _release(self) -> None:
        if self._listener is not None:
            self._listener.release()
        self._listener = self._deployed = None
        self._of_step = self._of_batch = None
        self._training_values = {}
        self._begin_evaluation()
        self.core.reset()

    # --- evaluations ------------------------------------------------------------------------------------------------

    @property
    def _eval_datasets(self) -> Any:
        return getattr(self._trainer, "eval_dataset", None)

    def _begin_evaluation(self) -> None:
        self._evaluation.begin()
        self._of_batch = None
        if self._deployed is not None:
            self._deployed.forget()

    def _end_dataset(self, prefix: str, logs: Mapping[str, Any], device: torch.device) -> dict[str, float]:
        """Return the measures of an evaluation by their names in the log, if this was the last of its datasets."""
        ended = self._evaluation.end_dataset(prefix, logs, self._eval_datasets)
        if ended is None:
            return {}
        values = {name: float(value) for name, value in self.core.end_validation(ended.names, device).items()}
        if self._deployed is not None:
            values |= {f"deployed/{name}": value for name, value in self._deployed.results(ended.names, device).items()}
        self._begin_evaluation()
        self._logged = ended.logged if values else {}
        return {f"{ended.prefix}_{name}": value for name, value in values.items()}

    def _say_that_nothing_is_measured(self) -> None:
        if not self._said:
            self._said = True
            warnings.warn(
                "RoutingMonitorCallback measures evaluations within train(); this one is not: write "
                "with callback.listening(trainer.model): trainer.evaluate()",
                stacklevel=3,
            )

    def _board(self, args: TrainingArguments, state: TrainerState) -> ReporterBoard:
        callbacks = [] if self._trainer is None else self._trainer.callback_handler.callbacks
        return ReporterBoard(
            list(args.report_to or ()), callbacks, state.global_step, first=state.is_world_process_zero
        )
