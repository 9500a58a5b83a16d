"""Read a transformers ``Trainer``: where it stands, what its data tell, where its reporters are."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from consistency_reg.optional import require

with require("accelerate"):
    import accelerate  # noqa: F401  (the Trainer needs it, and names it less clearly)
    from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

BOUNDARIES = ("document_ids", "position_ids", "seq_idx", "cu_seq_lens_q")  # what may tell where documents begin


def join_before_reporters(trainer: Trainer, callback: TrainerCallback) -> None:
    """Put a callback before a trainer's own, behind those of the same package."""
    package = __name__.partition(".")[0]
    others = trainer.callback_handler.callbacks
    ours = (type(other).__module__.partition(".")[0] == package for other in others)
    others.insert(next((index for index, is_ours in enumerate(ours) if not is_ours), len(others)), callback)


def told_boundaries(dataset: Any) -> tuple[str, ...]:
    """Return the columns of a dataset that may tell where documents begin.

    Example:
        >>> told_boundaries([{"input_ids": [1, 2], "document_ids": [0, 1]}])
        ('document_ids',)
    """
    names = getattr(dataset, "column_names", None)
    if names is None and hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and len(dataset):
        row = dataset[0]
        names = list(row) if isinstance(row, Mapping) else None
    return tuple(name for name in BOUNDARIES if name in (names or ()))


def check_boundaries(told: tuple[str, ...], given: Mapping[str, Any]) -> None:
    """Refuse a forward that was given no boundaries of documents although the dataset has them.

    Args:
        told: from :func:`told_boundaries`.
        given: the arguments of the forward by name.

    Raises:
        RuntimeError: the trainer, or its collator, dropped them.
    """
    if told and not any(name in given for name in BOUNDARIES):
        raise RuntimeError(
            f"the dataset tells by {list(told)} where documents begin, but the model was given {sorted(given)} alone: "
            "a Trainer drops columns that the model's forward does not name, unless remove_unused_columns=False, and a "
            "collator may drop them too. Let the model have them, or give masks="
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


def micro_batches(args: TrainingArguments, state: TrainerState, dataloader: Any) -> int:
    """Return the micro-batches of the present optimizer step: the last one of an epoch may have fewer."""
    accumulated = args.gradient_accumulation_steps
    steps = steps_of_epoch(args, dataloader)
    if steps is None or (state.global_step + 1) % steps:
        return accumulated
    return len(dataloader) % accumulated or accumulated
