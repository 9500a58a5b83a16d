"""Schedule, normalize and log the consistency term in transformers' Trainer and in TRL's trainers."""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from consistency_reg.capture import RouterAdapter
from consistency_reg.integrations.attach import attachments
from consistency_reg.integrations.optimizer_step import StepTerm
from consistency_reg.integrations.trainer_state import (
    checkpoint_of,
    join_before_reporters,
    micro_batches,
)
from consistency_reg.losses import RoutingLoss
from consistency_reg.masks import Masks
from consistency_reg.masks.hints import told_boundaries
from consistency_reg.optional import require
from consistency_reg.rerouting import RoutingSchedule
from consistency_reg.session import ListenOptions, Which
from consistency_reg.term import WeightSchedule, check_loss, check_name, usual_name

with require("accelerate"):
    import accelerate  # noqa: F401  (the Trainer needs it, and names it less clearly)
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

STATE_FILE = "consistency_loss.pt"


class ConsistencyCallback(TrainerCallback):
    """Adds ``weight(step) * loss(routing)`` to what a ``Trainer`` trains, from ``train()``'s begin to its end.

    An optimizer step has the mean of its micro-batches' terms, whatever the trainer makes of what the model returns:
    the model's own loss, averaged or by ``num_items_in_batch`` added up, that of another head, label smoothing,
    ``compute_loss_func``, TRL's policy, preference and reward losses. The term is in none of them: its gradient joins
    the backward pass (:func:`~consistency_reg.integrations.carry.carry`), so that the logged ``loss`` is without it.

    Logs ``consistency/loss`` (raw), ``/weight``, ``/weighted`` and the raw value of each layer as ``/layer_00``, ...,
    which are means since the last log on the first process; reporters write them below ``train/``. Reporters of
    ``report_to`` (wandb, tensorboard) come before the ``callbacks`` of a trainer and so would not see these values:
    :meth:`add_to` puts the callback before them.

    A trainer may have any number of terms, one callback each. What has a state, such as a running balance or the
    routers of an anchor, is kept in each checkpoint by the term's name.

    Args:
        loss: any :class:`~consistency_reg.losses.RoutingLoss`; ``LocalConsistencyLoss()`` when None.
        weight: weight of the term, >= 0.
        warmup_steps: optimizer steps over which the weight rises linearly from 0.
        start_step: optimizer step at which the term, and its warm-up, begins.
        end_step: optimizer step from which the weight is 0 again; never when None.
        cooldown_steps: optimizer steps before ``end_step`` over which the weight falls linearly to 0.
        name: of the term in the log, ``NAME/loss``, and in checkpoints. None for "consistency", or for other losses
            "balance", "z" or "anchor"; a second of the same name is called ``NAME_2``.
        routing: train with cache-aware routing in the forward pass, ``RoutingSchedule(strength=0.1)``, whose strength
            is logged as ``/routing``; of several terms give it to one. Evaluation and generation are as the model is:
            deploy it with :class:`~consistency_reg.CacheAwareRouting`.
        masks: as :func:`~consistency_reg.attach` takes it, as are the other options.

    Raises:
        ValueError: a negative or non-finite weight; when training begins, a model without routers, ``DataParallel``,
            fp16 under DeepSpeed.
        RuntimeError: in training, a term without gradient, or boundaries of documents that the dataset has and the
            model is not given; at the end of a micro-batch, one in which the trainer did
            not train everything once that the model returned with a gradient.

    Example:
        >>> callback = ConsistencyCallback(weight=0.35, warmup_steps=100)
        >>> callback.schedule.at(50)
        0.175
    """

    def __init__(
        self,
        loss: RoutingLoss | None = None,
        weight: float = 0.35,
        warmup_steps: int = 0,
        *,
        start_step: int = 0,
        end_step: int | None = None,
        cooldown_steps: int | None = None,
        name: str | None = None,
        masks: Callable[[Mapping[str, Any]], Masks] | None = None,
        adapters: Sequence[RouterAdapter] = (),
        keep_inputs: bool = False,
        layers: str | None = None,
        tokens: Which = "all",
        routing: RoutingSchedule | None = None,
    ) -> None:
        self.loss = check_loss(loss)
        self.schedule = WeightSchedule(weight, warmup_steps, start_step, end_step, cooldown_steps)
        self.name = check_name(name)
        self._options = ListenOptions(masks, adapters, layers, tokens, keep_inputs)
        self._routing = routing
        self._attachment: StepTerm | None = None
        self._seen: dict[str, list[Tensor | float]] = {}  # since the last log
        self._trainer: Trainer | None = None  # None where it was not told by add_to

    def add_to(self, trainer: Trainer) -> "ConsistencyCallback":
        """Join the trainer's callbacks before its reporters, so that they log the term too."""
        join_before_reporters(trainer, self)
        self._trainer = trainer
        return self

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Attach to the model; resume the state of the loss from a checkpoint."""
        if args.n_gpu > 1:
            raise ValueError(
                f"ConsistencyCallback needs one device for each process, got DataParallel over {args.n_gpu}: launch "
                "with torchrun or accelerate, or set CUDA_VISIBLE_DEVICES"
            )
        if args.fp16 and args.distributed_state is not None and "DEEPSPEED" in args.distributed_state.distributed_type:
            raise ValueError(
                "ConsistencyCallback cannot read the loss scale of DeepSpeed's fp16, got fp16=True with deepspeed: "
                "use bf16=True"
            )
        if args.report_to and self._trainer is None:
            warnings.warn(
                f"{args.report_to} will not see consistency/*: reporters come before a trainer's callbacks. Instead of "
                "callbacks=[ConsistencyCallback(...)] write ConsistencyCallback(...).add_to(trainer)",
                stacklevel=2,
            )
        self._release()
        for attachment in attachments(model):
            if attachment.during is not None and attachment.during is not state:  # was interrupted: nobody says so
                attachment.detach()
        earlier = [term for term in attachments(model) if isinstance(term, StepTerm)]
        name = self.name or usual_name(self.loss)
        same = sum(term.base_name == name for term in earlier)
        if same and self.name is None:
            warnings.warn(
                f"{same + 1} terms of a {type(self.loss).__name__} are trained at once: name each, "
                'ConsistencyCallback(..., name="mine"), or leave all but one out',
                stacklevel=2,
            )
        self.loss.to(args.device).train()
        weight = self.schedule.at(state.global_step)
        self._attachment = StepTerm(model, self.loss, weight, options=self._options, routing=self._routing)
        self._attachment.base_name, self._attachment.name = name, f"{name}_{same + 1}" if same else name
        self._attachment.during = state
        if self._options.masks is None:
            told = self._trainer or train_dataloader
            dataset = getattr(told, "train_dataset", None) or getattr(told, "dataset", None)
            self._attachment.told_boundaries = told_boundaries(dataset)
        self._attachment.attach()
        if state.global_step and self.loss.state_dict():
            self._load(checkpoint_of(args, state) / STATE_FILE, self._attachment.name)

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Set the weight of this optimizer step, and by what its gradients are scaled."""
        assert self._attachment is not None
        self._attachment.weight = self.schedule.at(state.global_step)
        self._attachment.begin_step(state.global_step)
        count = micro_batches(args, state, train_dataloader, self._trainer)
        self._attachment.begin(count, getattr(optimizer, "scaler", None))

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        """Check and keep what a micro-batch had."""
        assert self._attachment is not None
        routing = self._attachment.routing
        logged_routing = {} if routing is None else {"routing": routing.strength}
        for term in self._attachment.end_micro_batch():
            for name, value in (term.logged() | logged_routing).items():
                self._seen.setdefault(name, []).append(value)

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Check and keep what the last micro-batch of a step had, before the parameters move."""
        assert self._attachment is not None
        self.on_substep_end()
        self._attachment.end()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the means since the last log."""
        if self._attachment is None or not self._seen or logs is None or "loss" not in logs:
            return  # a log of the evaluation or of the end
        means = {
            f"{self._attachment.name}/{name}": torch.as_tensor(values, dtype=torch.float64).mean().item()
            for name, values in self._seen.items()
        }
        self._seen = {}
        logs |= means
        if state.log_history:
            state.log_history[-1] |= means

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Keep the state of every term in the checkpoint, if it has one."""
        terms = [term for term in attachments(model) if isinstance(term, StepTerm)]
        folder = checkpoint_of(args, state)
        if not terms or terms[0] is not self._attachment or not args.should_save or not folder.exists():
            return  # the first callback writes for all
        if states := {term.name: of_loss for term in terms if (of_loss := term.loss.state_dict())}:
            written = folder / f"{STATE_FILE}.part"
            torch.save(states, written)
            os.replace(written, folder / STATE_FILE)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Leave the model as it was."""
        self._release()

    def _load(self, saved: Path, name: str) -> None:
        states = torch.load(saved, map_location="cpu", weights_only=True) if saved.exists() else {}
        if name not in states and states.keys() == self.loss.state_dict().keys():  # as one term alone was kept before
            states = {name: states}
        if name in states:
            self.loss.load_state_dict(states[name])
            return
        warnings.warn(
            f"the state of {type(self.loss).__name__} begins anew, as there is no {saved} with {name!r}"
            f"{f', but with {sorted(states)}' if states else ''}: resume with the output_dir of the checkpoint and the "
            f"same terms, or give the loss its state of {STATE_FILE} by load_state_dict before train()",
            stacklevel=3,
        )

    def _release(self) -> None:
        if self._attachment is not None:
            self._attachment.detach()
        self._attachment = None
        self._seen = {}
