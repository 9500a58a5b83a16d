"""Launch the processes of cells on this machine; :mod:`.ray_cluster` launches them in a Ray cluster."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Protocol

from consistency_reg.lab.ablate import folder
from consistency_reg.lab.ablate.grid import Cell, Grid
from consistency_reg.lab.run_folder import Claim

FIT = (sys.executable, "-m", "consistency_reg", "fit")
BUSY = "another process works on it"


class Process(Protocol):
    """Stands for the process of a cell that runs."""

    def poll(self) -> str | None:
        """Return None while it runs, then "" or what went wrong; :data:`BUSY` if another works on it."""

    def terminate(self) -> None:
        """Ask the process to end, so that it can write a checkpoint."""

    def wait(self, seconds: float) -> bool:
        """Return whether the process has ended within so many seconds."""

    def kill(self) -> None:
        """End the process by force."""


class Launcher(Protocol):
    """Starts cells."""

    def slots(self) -> int:
        """Return how many cells can be at work at a time."""

    def start(self, grid: Grid, cell: Cell) -> Process | None:
        """Start a cell; None if another process works on it or has just finished it."""


class LocalLauncher:
    """Runs cells on this machine, each in a process of its own.

    Args:
        command: the command that trains a cell; gets the arguments of ``consistency-reg fit``.
        jobs: cells at a time; the threads of this machine are divided among them.
    """

    def __init__(self, command: Sequence[str] = FIT, jobs: int = 1) -> None:
        self.command = tuple(command)
        self.jobs = jobs

    def slots(self) -> int:
        """Return the number of jobs."""
        return self.jobs

    def start(self, grid: Grid, cell: Cell) -> Process | None:
        """Start a cell, unless another process works on it or has just finished it."""
        claim = folder.claim(grid, cell)
        if claim is None:
            return None
        arguments = [*self.command, *folder.fit_arguments(grid, cell, cell.run.cell_config)]
        try:
            return LocalProcess(arguments, cell_environment(grid, self.jobs, os.environ), cell, claim)
        except BaseException:
            claim.release()
            raise


class LocalProcess:
    """Runs a cell in a process that the claim of its folder is handed down to; its output goes to the cell's log."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], cell: Cell, claim: Claim) -> None:
        self._claim = claim
        with cell.run.log.open("ab") as log:
            # A session of its own: Ctrl-C reaches the cell once, from terminate, and not also from the terminal.
            self._process = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**environment, **claim.handed_down()},
                pass_fds=(claim.descriptor,),
                start_new_session=True,
            )

    def poll(self) -> str | None:
        """Return None while the process runs, then "" or how it failed."""
        code = self._process.poll()
        if code is None:
            return None
        self._claim.release()
        return describe_exit(code)

    def terminate(self) -> None:
        """Send SIGTERM to the process and its children, if it still runs."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGTERM)

    def wait(self, seconds: float) -> bool:
        """Return whether the process has ended within so many seconds."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        self._claim.release()
        return True

    def kill(self) -> None:
        """Send SIGKILL to the process and its children."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._claim.release()


def cell_environment(grid: Grid, jobs: int, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a cell's process: one wandb group for all, this machine's threads divided by jobs."""
    cell = {**environment, "WANDB_RUN_GROUP": grid.name, "PYTHONUNBUFFERED": "1"}
    if jobs > 1:
        threads = int(environment.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
        cell["OMP_NUM_THREADS"] = str(max(1, threads // jobs))
    return cell


def describe_exit(code: int) -> str:
    """Return what an exit code of a process means; empty for 0.

    Example:
        >>> describe_exit(0), describe_exit(1), describe_exit(-9)
        ('', 'exit code 1', 'killed by SIGKILL (out of memory?)')
    """
    if code >= 0:
        return f"exit code {code}" if code else ""
    name = signal.Signals(-code).name
    return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
