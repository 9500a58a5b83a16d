"""Boards: where a monitor shows what goes next to the logged numbers: pictures, tables, a summary, alerts."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from consistency_reg.optional import require

STEP, TOKENS = "trainer/global_step", "trainer/tokens"  # the axes; the first is what Lightning's WandbLogger calls it


@dataclass(frozen=True)
class Table:
    """Holds a table with a header."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


class Board:
    """Show what a monitor has besides plain numbers, at the present step of a trainer; this one warns and no more.

    A trainer's adapter overrides what its loggers can show. Nothing is shown on other processes than the first.
    """

    def scalars(self, values: Mapping[str, float]) -> None:
        """Log numbers."""

    def media(self, images: Mapping[str, Any], tables: Mapping[str, Table]) -> None:
        """Show images, [height, width, 3] uint8 arrays, and tables."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Keep values in the summary of a run."""

    def alert(self, title: str, text: str) -> None:
        """Tell the owner of a run, who may not look at the terminal."""

    def warn(self, text: str) -> None:
        """Warn on the terminal."""
        warnings.warn(text, stacklevel=2)


class WandbBoard(Board):
    """Show everything in a run of wandb.

    Args:
        run: what ``wandb.init`` returned.
        log: logs a row at the present step; ``run.log`` when None.
    """

    def __init__(self, run: Any, log: Callable[[dict[str, Any]], None] | None = None) -> None:
        self.run = run
        self.log = run.log if log is None else log

    def scalars(self, values: Mapping[str, float]) -> None:
        """Log numbers as a row."""
        self.log(dict(values))

    def media(self, images: Mapping[str, Any], tables: Mapping[str, Table]) -> None:
        """Log images and tables as one row."""
        with require("wandb"):
            import wandb
        row: dict[str, Any] = {key: wandb.Image(image) for key, image in images.items()}
        row |= {key: wandb.Table(list(t.columns), [list(r) for r in t.rows]) for key, t in tables.items()}
        self.log(row)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Write values next to the last value of everything, which wandb keeps in the summary by itself."""
        self.run.summary.update(dict(values))

    def alert(self, title: str, text: str) -> None:
        """Send an alert: wandb mails it, or posts it to Slack, as its user has set."""
        self.run.alert(title=title, text=text, level="WARN")


class TensorBoardBoard(Board):
    """Show numbers and images in TensorBoard.

    Args:
        writer: a ``SummaryWriter``.
        step: the present step.
    """

    def __init__(self, writer: Any, step: int) -> None:
        self.writer = writer
        self.step = step

    def scalars(self, values: Mapping[str, float]) -> None:
        """Add numbers."""
        for key, value in values.items():
            self.writer.add_scalar(key, value, self.step)

    def media(self, images: Mapping[str, Any], tables: Mapping[str, Table]) -> None:
        """Add images; TensorBoard has no tables."""
        for key, image in images.items():
            self.writer.add_image(key, image, self.step, dataformats="HWC")


class Boards(Board):
    """Show everything on several boards; a warning is given once."""

    def __init__(self, boards: Sequence[Board]) -> None:
        self.boards = tuple(boards)

    def scalars(self, values: Mapping[str, float]) -> None:
        """Log numbers on every board."""
        for board in self.boards:
            board.scalars(values)

    def media(self, images: Mapping[str, Any], tables: Mapping[str, Table]) -> None:
        """Show images and tables on every board."""
        for board in self.boards:
            board.media(images, tables)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Keep values in the summary of every board."""
        for board in self.boards:
            board.summary(values)

    def alert(self, title: str, text: str) -> None:
        """Alert on every board."""
        for board in self.boards:
            board.alert(title, text)


def define_axes(run: Any) -> None:
    """Tell a run of wandb that everything is over the trainer's step, and that the tokens seen are an axis too.

    wandb's own step counts the calls of ``log`` and continues where a run is resumed, so that nothing is dropped; these
    are the axes to read curves by.
    """
    run.define_metric(STEP)
    run.define_metric(TOKENS)
    run.define_metric("*", step_metric=STEP, step_sync=True)
