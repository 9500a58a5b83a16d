"""Read a transformers ``Trainer``: where it stands, where its reporters are, which columns it dropped."""

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from consistency_reg.masks.batches import BOUNDARIES
from consistency_reg.optional import require

with require("accelerate"):
    import accelerate  # noqa: F401  (the Trainer needs it, and names it less clearly)
    from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments


def join_before_reporters(trainer: Trainer, callback: TrainerCallback) -> None:
    """Put a callback before a trainer's own, behind those of the same package."""
    package = __name__.partition(".")[0]
    others = trainer.callback_handler.callbacks
    ours = (type(other).__module__.partition(".")[0] == package for other in others)
    others.insert(next((index for index, is_ours in enumerate(ours) if not is_ours), len(others)), callback)


def check_boundaries(told: tuple[str, ...], given: Mapping[str, Any]) -> None:
    """Refuse a forward that was given no boundaries of documents although the dataset has them.

    Args:
        told: from :func:`~consistency_reg.masks.hints.told_boundaries`.
        given: the arguments of the forward by name.

    Raises:
        RuntimeError: the trainer, or its collator, dropped them.

    Warns:
        UserWarning: the dataset has a column that may tell them, in a form that is not read.
    """
    if not told or any(name in given for name in (*BOUNDARIES, *told)):
        return
    dropped = (
        f"but the model was given {sorted(given)} alone: a Trainer drops columns that the model's forward does not "
        "name, unless remove_unused_columns=False, and a collator may drop them too. "
    )
    if any(name in BOUNDARIES for name in told):
        raise RuntimeError(
            f"the dataset tells by {list(told)} where documents begin, {dropped}Let the model have them, or give masks="
        )
    warnings.warn(
        f"the dataset may tell by {list(told)} where documents begin, {dropped}Each row counts as one document: let "
        "the model have document_ids or position_ids, or give masks=",
        stacklevel=2,
    )


def checkpoint_of(args: TrainingArguments, state: TrainerState) -> Path:
    """Return the folder of the checkpoint at the present step."""
    return Path(args.output_dir or ".", f"checkpoint-{state.global_step}")


def steps_of_epoch(args: TrainingArguments, dataloader: Any) -> int | None:
    """Return the optimizer steps of an epoch; None for a stream."""
    try:
        return max(math.ceil(len(dataloader) / args.gradient_accumulation_steps), 1)
    except TypeError:
        return None


def will_log(args: TrainingArguments, state: TrainerState, dataloader: Any) -> bool:
    """Return whether the trainer logs after the optimizer step that begins."""
    done = state.global_step + 1
    if args.logging_strategy == "steps":
        return done % max(int(state.logging_steps), 1) == 0 or (args.logging_first_step and done == 1)
    steps = steps_of_epoch(args, dataloader)
    return args.logging_strategy == "epoch" and steps is not None and done % steps == 0


def micro_batches(args: TrainingArguments, state: TrainerState, dataloader: Any, trainer: Trainer | None) -> int:
    """Return the micro-batches of the present optimizer step: the last one of an epoch may have fewer.

    The trainer knows, where it is given; without it the end of a stream is not foreseen.
    """
    known = getattr(trainer, "current_gradient_accumulation_steps", None)
    if known:
        return int(known)
    accumulated = args.gradient_accumulation_steps
    steps = steps_of_epoch(args, dataloader)
    if steps is None or (state.global_step + 1) % steps:
        return accumulated
    return len(dataloader) % accumulated or accumulated
