"""Show tables, pictures and alerts in the reporters of a transformers ``Trainer``: wandb, and TensorBoard."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from consistency_reg.tracking.board import Board, Boards, Table, TensorBoardBoard, WandbBoard

STEP = "train/global_step"  # the axis of transformers' WandbCallback


class ReporterBoard(Boards):
    """Shows in wandb's run and in TensorBoard, at the present step, under ``eval/`` in place of ``val/``.

    Args:
        report_to: the names of the trainer's reporters.
        callbacks: of the trainer; TensorBoard's is found among them.
        step: the present step.
        first: whether this is the process that shows.
    """

    def __init__(self, report_to: Sequence[str], callbacks: Sequence[Any], step: int, *, first: bool = True) -> None:
        boards: list[Board] = []
        wandb = sys.modules.get("wandb") if "wandb" in report_to else None
        if first and (run := getattr(wandb, "run", None)) is not None:
            boards.append(WandbBoard(run, lambda row: run.log({**row, STEP: step})))
        if first and "tensorboard" in report_to:
            writers = (getattr(callback, "tb_writer", None) for callback in callbacks)
            boards += [TensorBoardBoard(writer, step) for writer in writers if writer is not None]
        super().__init__(boards)

    @property
    def shows_pictures(self) -> bool:
        """Return whether a reporter can hold pictures."""
        return bool(self.boards)

    def scalars(self, values: Mapping[str, float]) -> None:
        """Log numbers."""
        super().scalars(_renamed(values))

    def media(self, images: Mapping[str, Any], tables: Mapping[str, Table]) -> None:
        """Show images and tables."""
        super().media(_renamed(images), _renamed(tables))

    def summary(self, values: Mapping[str, Any]) -> None:
        """Write into the summary of wandb's run."""
        super().summary(_renamed(values))


def _renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values under the names that the trainer's own have."""
    return {
        f"eval/{key[4:]}" if key.startswith("val/") else key.replace("best/val/", "best/eval/"): value
        for key, value in values.items()
    }
