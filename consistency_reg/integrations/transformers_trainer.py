"""The consistency term in transformers' Trainer and TRL's SFTTrainer: scheduled, normalized, logged."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from consistency_reg.capture import RouterAdapter
from consistency_reg.integrations.attach import Attachment, attachments
from consistency_reg.losses import RoutingLoss
from consistency_reg.masks import Masks
from consistency_reg.optional import require
from consistency_reg.term import WeightSchedule, check_loss

with require("accelerate"):
    import accelerate  # noqa: F401  (the Trainer needs it, and names it less clearly)
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

STATE_FILE = "consistency_loss.pt"


class ConsistencyCallback(TrainerCallback):
    """Adds ``weight(step) * loss(routing)`` to what a ``Trainer`` trains, from ``train()``'s begin to its end.

    An optimizer step has the mean of its micro-batches' terms, whether the trainer averages their losses or, by
    ``num_items_in_batch``, adds them up. (TRL's ``SFTTrainer`` weights them by their predicted tokens.)

    Logs ``consistency/loss`` (raw), ``/weight``, ``/weighted`` and the raw value of each layer as ``/layer_00``, ...,
    which are means since the last log on the first process; reporters write them below ``train/``. Reporters of
    ``report_to`` (wandb, tensorboard) come before the ``callbacks`` of a trainer and so would not see these values:
    :meth:`add_to` puts the callback before them.

    Args:
        loss: any :class:`~consistency_reg.losses.RoutingLoss`; ``LocalConsistencyLoss()`` when None.
        weight: weight of the term, >= 0.
        warmup_steps: optimizer steps over which the weight rises linearly from 0.
        start_step: optimizer step at which the term, and its warm-up, begins.
        masks: as :func:`~consistency_reg.attach` takes it, as are the options below.

    Raises:
        ValueError: a negative or non-finite weight; when training begins, a model without routers, ``DataParallel``.
        RuntimeError: in training, as :func:`~consistency_reg.attach` does.

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
        masks: Callable[[Mapping[str, Any]], Masks] | None = None,
        adapters: Sequence[RouterAdapter] = (),
        keep_inputs: bool = False,
        layers: str | None = None,
    ) -> None:
        self.loss = check_loss(loss)
        self.schedule = WeightSchedule(weight, warmup_steps, start_step)
        self._options: dict[str, Any] = {
            "masks": masks,
            "adapters": adapters,
            "keep_inputs": keep_inputs,
            "layers": layers,
        }
        self._attachment: Attachment | None = None
        self._seen: dict[str, list[Tensor | float]] = {}  # since the last log
        self._heard_first = False

    def add_to(self, trainer: Trainer) -> "ConsistencyCallback":
        """Join the trainer's callbacks before its reporters, so that they log the term too."""
        trainer.callback_handler.callbacks.insert(0, self)
        self._heard_first = True
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Attach to the model; go on from a checkpoint's state of the loss."""
        if args.n_gpu > 1:
            raise ValueError(
                f"ConsistencyCallback needs one device for each process, got DataParallel over {args.n_gpu}: launch "
                "with torchrun or accelerate, or set CUDA_VISIBLE_DEVICES"
            )
        if args.report_to and not self._heard_first:
            warnings.warn(
                f"{args.report_to} will not see consistency/*: reporters come before a trainer's callbacks. Instead of "
                "callbacks=[ConsistencyCallback(...)] write ConsistencyCallback(...).add_to(trainer)",
                stacklevel=2,
            )
        self._release()
        for attachment in attachments(model):
            if attachment.during is not None and attachment.during is not state:  # was interrupted: nobody says so
                attachment.detach()
        if state.global_step and self.loss.state_dict():
            self._load(_checkpoint(args, state) / STATE_FILE)
        self.loss.to(args.device).train()
        self._attachment = Attachment(model, self.loss, self.schedule.at(state.global_step), **self._options).attach()
        self._attachment.during = state

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Set the weight of this optimizer step and what its losses are divided by."""
        assert self._attachment is not None
        self._attachment.weight = self.schedule.at(state.global_step)
        processes = args.world_size if args.average_tokens_across_devices else 1  # by which the trainer multiplies
        self._attachment.summed = processes * _micro_batches(args, state, train_dataloader)

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        """Keep what a micro-batch had."""
        assert self._attachment is not None
        if self._attachment.term is not None:
            for name, value in self._attachment.term.logged().items():
                self._seen.setdefault(name, []).append(value)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Keep what the last micro-batch of a step had."""
        self.on_substep_end()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the means since the last log."""
        if not self._seen or logs is None or "loss" not in logs:  # a log of the evaluation or of the end
            return
        means = {
            f"consistency/{name}": torch.as_tensor(values, dtype=torch.float64).mean().item()
            for name, values in self._seen.items()
        }
        self._seen = {}
        logs |= means
        if state.log_history:
            state.log_history[-1] |= means

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep the state of the loss in the checkpoint, if it has one."""
        folder = _checkpoint(args, state)
        if args.should_save and folder.exists() and (of_loss := self.loss.state_dict()):
            torch.save(of_loss, folder / STATE_FILE)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Leave the model as it was."""
        self._release()

    def _load(self, saved: Path) -> None:
        if saved.exists():
            self.loss.load_state_dict(torch.load(saved, map_location="cpu", weights_only=True))
        else:
            warnings.warn(
                f"the state of {type(self.loss).__name__} begins anew, as there is no {saved}: resume with the "
                f"output_dir of the checkpoint, or give the loss its {STATE_FILE} by load_state_dict before train()",
                stacklevel=3,
            )

    def _release(self) -> None:
        if self._attachment is not None:
            self._attachment.detach()
        self._attachment = None
        self._seen = {}


def _micro_batches(args: TrainingArguments, state: TrainerState, dataloader: Any) -> int:
    """Of the present optimizer step: the last one of an epoch may have fewer."""
    accumulated = args.gradient_accumulation_steps
    try:
        batches = len(dataloader)
    except TypeError:  # a stream
        return accumulated
    is_last = (state.global_step + 1) % max(math.ceil(batches / accumulated), 1) == 0
    return (batches % accumulated or accumulated) if is_last else accumulated


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or ".", f"checkpoint-{state.global_step}")
