"""The same grid as a wandb sweep: its parameters are the axes, its values the labels."""

import os
from pathlib import Path
from typing import Any

from consistency_reg.lab.ablate.grid import Grid
from consistency_reg.lab.files import write_atomically
from consistency_reg.optional import require

with require("lightning"):
    import yaml


def sweep(grid: Grid) -> dict[str, Any]:
    """Return the grid as ``wandb sweep`` takes it: its agents run one cell at a time with ``ablate --only``.

    Cells that are finished, also those that no agent ran, are not run again.
    """
    axes: dict[str, list[Any]] = {axis: list(values) for axis, values in grid.axes.items()}
    command = ["${env}", "${interpreter}", "-m", "consistency_reg", "ablate", os.path.relpath(grid.path), "--only"]
    return {
        "name": grid.name,
        "program": "consistency_reg",  # required; the command below is what runs
        "method": "grid",
        "metric": {"name": "val/ppl", "goal": "minimize"},
        "parameters": {axis: {"values": labels} for axis, labels in {**axes, "seed": list(grid.seeds)}.items()},
        "command": [*command, "${args_no_hyphens}"],
    }


def export_sweep(grid: Grid, path: Path) -> None:
    """Write what :func:`sweep` returns as YAML."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, yaml.safe_dump(sweep(grid), sort_keys=False))
