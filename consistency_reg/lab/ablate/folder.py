"""The folder of a cell: what it was made with, who works on it, how far it is, what came out."""

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from consistency_reg.lab.ablate.grid import Cell, Grid
from consistency_reg.lab.files import write_atomically
from consistency_reg.optional import require

with require("lightning"):
    import yaml

DEFAULTS = Path(__file__).parents[1] / "defaults.yaml"  # what every recipe starts from
RESULT, PROGRESS, CONFIG, SETTINGS, LOG, LOCK = (
    "result.json",
    "progress.json",
    "cell.yaml",
    "cell.json",
    "log.txt",
    "lock",
)


def is_finished(cell: Cell) -> bool:
    """Whether the cell's run came to its end."""
    return (cell.folder / RESULT).exists()


def fit_arguments(grid: Grid, cell: Cell, config: Path) -> list[str]:
    """The arguments of ``consistency-reg fit`` for one cell whose own recipe lies at ``config``."""
    files = [*grid.recipes, config]
    return [argument for file in files for argument in ("--config", str(file))] + ["--run_dir", str(cell.folder)]


def write_config(cell: Cell, path: Path) -> None:
    """What the cell changes in the recipe, as a recipe."""
    write_atomically(path, yaml.safe_dump(cell.config, sort_keys=False))


def settings(grid: Grid, cell: Cell) -> dict[str, Any]:
    """All that decides a cell's result, and the place of the cell in its grid; what ``cell.json`` holds."""
    recipes = [yaml.safe_load(recipe.read_text()) for recipe in (DEFAULTS, *grid.recipes)]
    content = {"labels": cell.labels, "seed": cell.seed, "overrides": cell.overrides, "recipes": recipes}
    return json.loads(json.dumps(content, default=str))


def refuse_other_settings(grid: Grid, cells: tuple[Cell, ...]) -> None:
    """Raise ValueError if a cell's folder holds a run of other settings: it must be neither reused nor overwritten."""
    for cell in cells:
        path = cell.folder / SETTINGS
        if not path.exists():
            if cell.folder.is_dir() and any(cell.folder.iterdir()) and not (cell.folder / LOCK).exists():
                raise ValueError(
                    f"{cell.folder} is there already and is no cell of an ablation: change runs, or move it"
                )
            continue
        before, now = json.loads(path.read_text()), settings(grid, cell)
        if changed := [key for key in now if now[key] != before.get(key)]:
            raise ValueError(
                f"{cell.folder} holds a run made with other {' and '.join(changed)} than {grid.path} asks for now: "
                "remove it, or change runs"
            )


def prepare(grid: Grid, cell: Cell) -> None:
    """Make the folder, with the cell's recipe and settings in it."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    write_config(cell, cell.folder / CONFIG)
    write_atomically(cell.folder / SETTINGS, json.dumps(settings(grid, cell), indent=1))


class CellLock:
    """Only one process works on a cell.

    The cell's own process inherits the lock: it holds even when the process that started it is killed, and ends with
    whoever of the two ends last.
    """

    def __init__(self, cell: Cell) -> None:
        cell.folder.mkdir(parents=True, exist_ok=True)
        self.descriptor = os.open(cell.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)

    @classmethod
    def acquire(cls, cell: Cell) -> "CellLock | None":
        """The lock, or None while another process has it."""
        lock = cls(cell)
        try:
            fcntl.flock(lock.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock.descriptor)
            return None
        return lock

    def release(self) -> None:
        """Unlock, also for processes that inherited the lock; without effect the second time."""
        if self.descriptor >= 0:
            fcntl.flock(self.descriptor, fcntl.LOCK_UN)
            os.close(self.descriptor)
            self.descriptor = -1


def claim(grid: Grid, cell: Cell) -> CellLock | None:
    """The lock of a cell whose folder is prepared; None if another process works on it or has just finished it."""
    lock = CellLock.acquire(cell)
    if lock is None:
        return None
    try:
        if not is_finished(cell):
            prepare(grid, cell)
            return lock
    except BaseException:
        lock.release()
        raise
    lock.release()
    return None


def read_progress(cell: Cell) -> dict[str, Any] | None:
    """What the cell last wrote of itself, and under "written" when; None before it did."""
    path = cell.folder / PROGRESS
    try:
        return {**json.loads(path.read_text()), "written": path.stat().st_mtime}
    except (OSError, ValueError):
        return None


def log_tail(cell: Cell, lines: int = 8) -> list[str]:
    """The last lines of the cell's log that say something; of a progress bar only its last state."""
    try:
        text = (cell.folder / LOG).read_bytes()[-20_000:].decode(errors="replace")
    except OSError:
        return []
    shown = [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n")]
    return [line for line in shown if line][-lines:]
