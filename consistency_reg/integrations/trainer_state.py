"""Read a transformers ``Trainer``: where it stands, what its data tell, where its reporters are."""

import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from consistency_reg.hints import OF_BOUNDARIES, is_hint
from consistency_reg.optional import require

with require("accelerate"):
    import accelerate  # noqa: F401  (the Trainer needs it, and names it less clearly)
    from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

BOUNDARIES = ("document_ids", "position_ids", "seq_idx", "cu_seq_lens_q")  # what may tell where documents begin
# In a row of a dataset; in a batch such a name may hold the lengths of its rows.
LENGTHS = re.compile(r"(^|_)seq(uence)?_?(len|length)s$")


def join_before_reporters(trainer: Trainer, callback: TrainerCallback) -> None:
    """Put a callback before a trainer's own, behind those of the same package."""
    package = __name__.partition(".")[0]
    others = trainer.callback_handler.callbacks
    ours = (type(other).__module__.partition(".")[0] == package for other in others)
    others.insert(next((index for index, is_ours in enumerate(ours) if not is_ours), len(others)), callback)


def told_boundaries(dataset: Any) -> tuple[str, ...]:
    """Return the columns of a dataset that tell, or may tell, where documents begin.

    Example:
        >>> told_boundaries([{"input_ids": [1, 2], "document_ids": [0, 1], "doc_id": "a name", "seq_lengths": [1, 1]}])
        ('document_ids', 'seq_lengths')
    """
    names = getattr(dataset, "column_names", None)
    row: Mapping[str, Any] = {}
    if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and len(dataset):
        first = dataset[0]
        row = first if isinstance(first, Mapping) else {}
    known = tuple(name for name in BOUNDARIES if name in (names or row))
    names_of_row = (name for name in row if isinstance(name, str))
    hints = (name for name in names_of_row if OF_BOUNDARIES.search(name.lower()) or LENGTHS.search(name.lower()))
    return known + tuple(name for name in hints if name not in known and _is_row(name, row[name]))


def _is_row(name: str, value: Any) -> bool:
    """Return whether a column holds numbers for tokens or documents, not one thing for a row."""
    values = value.tolist() if hasattr(value, "tolist") else value
    return is_hint(name, value) and isinstance(values, list | tuple) and all(isinstance(one, int) for one in values)


def check_boundaries(told: tuple[str, ...], given: Mapping[str, Any]) -> None:
    """Refuse a forward that was given no boundaries of documents although the dataset has them.

    Args:
        told: from :func:`told_boundaries`.
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
