"""The command ``consistency-reg ablate``."""

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from consistency_reg.lab.ablate.folder import (
    fit_arguments,
    refuse_other_settings,
    write_config,
)
from consistency_reg.lab.ablate.grid import Cell, Grid
from consistency_reg.lab.ablate.launchers import FIT, Launcher, LocalLauncher
from consistency_reg.lab.ablate.progress import LiveDisplay
from consistency_reg.lab.ablate.scheduler import Outcome, run_cells
from consistency_reg.lab.ablate.schema import load_grid
from consistency_reg.lab.ablate.sweep import export_sweep
from consistency_reg.lab.arguments.ablate import parser


def main(
    argv: Sequence[str] | None = None,
    *,
    command: Sequence[str] = FIT,
    check: Callable[[list[str]], None] | None = None,
) -> int:
    """Run ``consistency-reg ablate``; 0 when every cell is finished.

    Args:
        argv: the command's arguments; those of the process when None.
        command: what trains a cell, with the arguments of ``consistency-reg fit``.
        check: raises ValueError on arguments that ``command`` would refuse; that of ``consistency-reg fit`` when None.
    """
    options = parser().parse_args(argv)
    _check_resources(options)
    grid = load_grid(options.grid)
    cells = grid.select(options.only)
    if options.export_sweep is not None:
        export_sweep(grid, options.export_sweep)
        print(f"written: start it with `wandb sweep {options.export_sweep}`")
        return 0
    print(f"{grid.path}: checking {len(cells)} cells", file=sys.stderr, flush=True)
    check_cells(grid, cells, check)
    refuse_other_settings(grid, cells)
    if options.dry_run:
        for cell in cells:
            print(f"{cell.name}: {'finished' if cell.run.is_finished else 'to run'}")
        return 0
    launcher = _launcher(options, command)
    with LiveDisplay(launcher.slots()) as display:
        outcomes = run_cells(grid, cells, display, launcher)
    return report_outcomes(grid, outcomes)


def _check_resources(options: argparse.Namespace) -> None:
    for name in ("jobs", "cpus", "gpus"):
        value, least = getattr(options, name), 0 if name == "gpus" else 1
        if value is not None and value < least:
            raise ValueError(f"--{name} must be at least {least}, got {value}")
    if options.launcher == "local" and (options.cpus is not None or options.gpus is not None):
        raise ValueError("--cpus and --gpus are what a cell gets with --launcher ray; on one machine --jobs divides it")


def _launcher(options: argparse.Namespace, command: Sequence[str]) -> Launcher:
    if options.launcher == "local":
        return LocalLauncher(command, options.jobs or 1)
    from consistency_reg.lab.ablate.ray_cluster import RayLauncher

    return RayLauncher(command, options.jobs, cpus=options.cpus or 1, gpus=options.gpus or 0)


def check_cells(grid: Grid, cells: Sequence[Cell], check: Callable[[list[str]], None] | None = None) -> None:
    """Raise ValueError, naming the cell, if ``fit`` would refuse a cell's recipe. Seeds share a recipe."""
    if check is None:
        from consistency_reg.lab.train import check_config

        check = check_config
    checked = set[tuple[str, ...]]()
    with tempfile.TemporaryDirectory() as scratch:
        for cell in cells:
            if (labels := tuple(cell.labels.values())) in checked:
                continue
            checked.add(labels)
            config = Path(scratch, "cell.yaml")
            write_config(cell, config)
            try:
                check(fit_arguments(grid, cell, config))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{grid.path}: cell {cell.name}: {error}") from error


def report_outcomes(grid: Grid, outcomes: Sequence[Outcome]) -> int:
    """Say how the cells ended, of the failed ones the end of their logs; 1 if one failed."""
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    for outcome in failed:
        print(f"\n{outcome.cell.name} failed: {outcome.error}; the end of {outcome.cell.run.log}:", file=sys.stderr)
        for line in outcome.cell.run.log_tail():
            print(f"    {line}", file=sys.stderr)
    ran = sum(outcome.ran and outcome.error is None for outcome in outcomes)
    before = sum(not outcome.ran for outcome in outcomes)
    print(f"{grid.runs}: {ran} cells run, {before} finished before, {len(failed)} failed")
    return 1 if failed else 0
