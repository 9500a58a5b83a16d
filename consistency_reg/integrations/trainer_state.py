"""Read from a transformers ``Trainer``'s arguments and state where it stands."""

import math
from pathlib import Path
from typing import Any

from consistency_reg.optional import require

with require("accelerate"):
    import accelerate  # noqa: F401  (the Trainer needs it, and names it less clearly)
    from transformers import TrainerState, TrainingArguments


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
