"""Runs the cells of an ablation, each in a process of its own, a few at a time."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from consistency_reg.ablation import folder
from consistency_reg.ablation.folder import CellLock
from consistency_reg.ablation.grid import Cell, Grid
from consistency_reg.ablation.progress import CellState, Display

FIT = (sys.executable, "-m", "consistency_reg", "fit")
GRACE_SECONDS = 20.0


@dataclass(frozen=True)
class Outcome:
    """How a cell ended.

    Attributes:
        ran: False when it had been finished before.
        error: None for a finished cell.
    """

    cell: Cell
    ran: bool
    error: str | None = None


@dataclass
class _Running:
    state: CellState
    process: subprocess.Popen[bytes]
    lock: CellLock


def run_cells(
    grid: Grid,
    cells: Sequence[Cell],
    display: Display,
    *,
    jobs: int = 1,
    command: Sequence[str] = FIT,
    poll_seconds: float = 0.2,
) -> list[Outcome]:
    """Run the cells that are not finished, ``jobs`` at a time, and say how each ended, in the order of ``cells``.

    A failing cell does not stop the others. A cell that another process works on is waited for. When this process is
    interrupted or terminated, it ends its cells; they go on where they stopped when they are run again.

    Args:
        grid: the ablation.
        cells: those of its cells that are to be run.
        display: is told of every change.
        jobs: cells at a time; the threads of this machine are divided among them.
        command: the command that trains a cell; gets the arguments of ``consistency-reg fit``.
        poll_seconds: how often to look at the cells.
    """
    states = [CellState(cell) for cell in cells]
    waiting, running = list(states), list[_Running]()
    outcomes: dict[Path, Outcome] = {}
    environment = cell_environment(grid, jobs, os.environ)

    def settle(state: CellState, outcome: Outcome) -> None:
        outcomes[state.cell.folder] = outcome
        state.end(failed=outcome.error is not None)

    with _termination_as_interrupt():
        try:
            while waiting or running:
                for task in [task for task in running if task.process.poll() is not None]:
                    running.remove(task)
                    settle(task.state, _ended(task))
                for state in [state for state in waiting if folder.is_finished(state.cell)]:
                    waiting.remove(state)
                    settle(state, Outcome(state.cell, ran=False))
                for state in list(waiting):
                    if len(running) < jobs and (started := _start(grid, state, command, environment)):
                        waiting.remove(state)
                        running.append(started)
                for state in states:
                    state.observe()
                display.update(states)
                if waiting or running:
                    time.sleep(poll_seconds)
        finally:
            _stop(running)
    return [outcomes[cell.folder] for cell in cells]


def cell_environment(grid: Grid, jobs: int, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a cell's process: one wandb group for all, and this machine's threads divided by jobs."""
    cell = {**environment, "WANDB_RUN_GROUP": grid.name, "PYTHONUNBUFFERED": "1"}
    if jobs > 1:
        threads = int(environment.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
        cell["OMP_NUM_THREADS"] = str(max(1, threads // jobs))
    return cell


def _start(grid: Grid, state: CellState, command: Sequence[str], environment: dict[str, str]) -> _Running | None:
    """Start a cell, unless another process works on it or has just finished it."""
    cell = state.cell
    lock = CellLock.acquire(cell)
    if lock is None:
        state.status = "elsewhere"
        return None
    try:
        if folder.is_finished(cell):
            lock.release()
            return None
        folder.prepare(grid, cell)
        with (cell.folder / folder.LOG).open("ab") as log:
            # A session of its own: Ctrl-C reaches the cell once, from _stop, and not also from the terminal.
            process = subprocess.Popen(
                [*command, *folder.fit_arguments(grid, cell, cell.folder / folder.CONFIG)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=(lock.descriptor,),
                start_new_session=True,
            )
    except BaseException:
        lock.release()
        raise
    state.begin()
    return _Running(state, process, lock)


def _ended(task: _Running) -> Outcome:
    task.lock.release()
    cell, code = task.state.cell, task.process.returncode
    if folder.is_finished(cell):
        return Outcome(cell, ran=True)
    if code < 0:
        name = signal.Signals(-code).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return Outcome(cell, ran=True, error=f"killed by {name}{hint}")
    return Outcome(cell, ran=True, error=f"exit code {code}" if code else "ended without a result")


def _stop(running: list[_Running]) -> None:
    """End the cells: politely, so that they can write a checkpoint, then by force."""
    for task in running:
        if task.process.poll() is None:
            os.killpg(task.process.pid, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    for task in running:
        try:
            task.process.wait(max(0.0, deadline - time.monotonic()))
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            os.killpg(task.process.pid, signal.SIGKILL)
            task.process.wait()
        task.lock.release()


@contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    """SIGTERM and SIGHUP raise KeyboardInterrupt, so that no cell is left behind without anybody to watch it."""
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
