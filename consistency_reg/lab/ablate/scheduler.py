"""Runs the cells of an ablation, each in a process of its own, a few at a time."""

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from consistency_reg.lab.ablate.grid import Cell, Grid
from consistency_reg.lab.ablate.launchers import BUSY, Launcher, Process
from consistency_reg.lab.ablate.progress import CellState, LiveDisplay

GRACE_SECONDS = 20.0


@dataclass(frozen=True)
class Outcome:
    """Holds the end of a cell: finished, failed or interrupted.

    Attributes:
        ran: False when it had been finished before.
        error: None for a finished cell.
    """

    cell: Cell
    ran: bool
    error: str | None = None


def run_cells(
    grid: Grid,
    cells: Sequence[Cell],
    display: LiveDisplay,
    launcher: Launcher,
    *,
    poll_seconds: float = 0.2,
) -> list[Outcome]:
    """Run the cells that are not finished, and say how each ended, in the order of ``cells``.

    A failing cell does not stop the others. A cell that another process works on is waited for. When this process is
    interrupted or terminated, it ends its cells; they resume where they stopped when they are run again.

    Args:
        grid: the ablation.
        cells: those of its cells that are to be run.
        display: is told of every change.
        launcher: where they run, and how many at a time.
        poll_seconds: how often to look at the cells.
    """
    states = [CellState(cell) for cell in cells]
    waiting, running = list(states), list[tuple[CellState, Process]]()
    outcomes: dict[Path, Outcome] = {}

    def settle(state: CellState, outcome: Outcome) -> None:
        outcomes[state.cell.folder] = outcome
        state.end(failed=outcome.error is not None)

    with _termination_as_interrupt():
        try:
            while waiting or running:
                for state, process in list(running):
                    if (problem := process.poll()) is None:
                        continue
                    running.remove((state, process))
                    if problem == BUSY:
                        state.status = "elsewhere"
                        waiting.append(state)
                    else:
                        settle(state, _outcome(state.cell, problem))
                for state in [state for state in waiting if state.cell.run.is_finished]:
                    waiting.remove(state)
                    settle(state, Outcome(state.cell, ran=False))
                slots = launcher.slots()
                for state in list(waiting):
                    if len(running) < slots and (started := _start(grid, state, launcher)):
                        waiting.remove(state)
                        running.append((state, started))
                for state in states:
                    state.observe()
                display.update(states)
                if waiting or running:
                    time.sleep(poll_seconds)
        finally:
            _stop([process for _, process in running])
    return [outcomes[cell.folder] for cell in cells]


def _start(grid: Grid, state: CellState, launcher: Launcher) -> Process | None:
    process = launcher.start(grid, state.cell)
    if process is not None:
        state.begin()
    elif not state.cell.run.is_finished:
        state.status = "elsewhere"
    return process


def _outcome(cell: Cell, problem: str) -> Outcome:
    if cell.run.is_finished:
        return Outcome(cell, ran=True)
    return Outcome(cell, ran=True, error=problem or "ended without a result")


def _stop(processes: Sequence[Process]) -> None:
    """End the cells: politely, so that they can write a checkpoint, then by force."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for process in processes:
        try:
            ended = process.wait(max(0.0, deadline - time.monotonic()))
        except KeyboardInterrupt:
            ended = False
        if not ended:
            process.kill()


@contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise KeyboardInterrupt, so that no cell is left running with nobody to watch it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    heeded = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
