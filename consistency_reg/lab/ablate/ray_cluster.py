"""Runs the cells of an ablation on the machines of a Ray cluster.

Every machine has to see the same files under the same paths (the grid's, the runs folder, the working folder), as
clusters with a network file system do, and to have this package installed. Processes are kept apart by the same locks
as on one machine, so that several ablations, with and without Ray, may share a grid.
"""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from consistency_reg.lab.ablate import folder
from consistency_reg.lab.ablate.grid import Cell, Grid
from consistency_reg.lab.ablate.launchers import BUSY, FIT, LocalProcess, Process, cell_environment
from consistency_reg.lab.run_folder import Claim, RunFolder
from consistency_reg.optional import require

with require("ray"):
    import ray

GRACE_SECONDS = 15.0  # less than the scheduler waits for this task
PYTHON = "{python}"  # stands for the interpreter of the machine that the cell runs on
PASSED_ON = ("WANDB_MODE", "CONSISTENCY_REG_CACHE", "HF_HUB_OFFLINE")  # what cells shall find as this process does


class RayLauncher:
    """Runs cells as tasks of the Ray cluster at ``$RAY_ADDRESS``, or the one that this machine belongs to, or else of
    one that is started here for the purpose.

    Args:
        command: the command that trains a cell; gets the arguments of ``consistency-reg fit``.
        jobs: cells at a time at most; as many as the cluster has room for when None.
        cpus: CPUs, and so threads, for each cell.
        gpus: GPUs for each cell.

    Raises:
        ValueError: no machine of the cluster has so many CPUs or GPUs.
    """

    def __init__(
        self, command: Sequence[str] = FIT, jobs: int | None = None, *, cpus: int = 1, gpus: float = 0
    ) -> None:
        self.command = tuple(command)
        self.jobs = jobs
        self.resources = {"CPU": float(cpus), "GPU": float(gpus)}
        if not ray.is_initialized():
            ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
        if not self.slots():
            machines = "; ".join(
                ", ".join(f"{machine['Resources'].get(name, 0):g} {name}s" for name in self.resources)
                for machine in _machines()
            )
            raise ValueError(
                f"a machine of the Ray cluster must have {cpus} CPUs and {gpus:g} GPUs for a cell, got {machines}"
            )

    def slots(self) -> int:
        """Return how many cells the machines have room for, at most ``jobs``."""
        room = sum(
            min(int(machine["Resources"].get(name, 0) // wanted) for name, wanted in self.resources.items() if wanted)
            for machine in _machines()
        )
        return room if self.jobs is None else min(room, self.jobs)

    def start(self, grid: Grid, cell: Cell) -> Process | None:
        """Hand a cell to the cluster, unless another process works on it or has just finished it."""
        claim = folder.claim(grid, cell)
        if claim is None:
            return None
        claim.release()  # the cell's own process takes it, on the machine that it runs on
        given = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        threads = {"OMP_NUM_THREADS": str(max(1, int(self.resources["CPU"])))}
        task = _run_cell.options(
            name=cell.name, num_cpus=self.resources["CPU"], num_gpus=self.resources["GPU"], max_retries=0
        )
        arguments = folder.fit_arguments(grid, cell, cell.run.cell_config)
        reference = task.remote(
            [PYTHON if part == sys.executable else part for part in self.command] + arguments,
            {**cell_environment(grid, 1, given), **threads},
            cell,
            Path.cwd(),
        )
        return RayProcess(reference)


class RayProcess:
    """Stands for a cell at work somewhere in the cluster."""

    def __init__(self, reference: "ray.ObjectRef[str]") -> None:
        self._reference = reference

    def poll(self) -> str | None:
        """Return None while the cell runs, then "" or what went wrong, with it or with its machine."""
        return self._result() if self.wait(0) else None

    def terminate(self) -> None:
        """Interrupt the task, which ends the cell's process."""
        ray.cancel(self._reference, force=False)

    def wait(self, seconds: float) -> bool:
        """Return whether the cell has ended within so many seconds."""
        return bool(ray.wait([self._reference], timeout=seconds)[0])

    def kill(self) -> None:
        """End the task's worker."""
        ray.cancel(self._reference, force=True)

    def _result(self) -> str:
        try:
            return ray.get(self._reference)
        except ray.exceptions.RayError as error:
            return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"


@ray.remote
def _run_cell(arguments: list[str], environment: dict[str, str], cell: Cell, cwd: Path) -> str:
    """Run a cell's process on this machine to its end. -> "", or what went wrong."""
    if not RunFolder(cwd / cell.folder).cell_config.exists():
        return f"{cwd / cell.folder} is not to be seen on {os.uname().nodename}: the machines must share their files"
    os.chdir(cwd)
    claim = Claim.take(cell.run)
    if claim is None:
        return BUSY
    arguments = [sys.executable if part == PYTHON else part for part in arguments]
    process = LocalProcess(arguments, {**os.environ, **environment}, cell, claim)
    try:
        while (ended := process.poll()) is None:
            time.sleep(0.2)  # a cancellation interrupts between two looks, and could not interrupt a wait
        return ended
    finally:
        process.terminate()
        if not process.wait(GRACE_SECONDS):
            process.kill()


def _machines() -> list[dict]:
    return [machine for machine in ray.nodes() if machine["Alive"]]
