"""The folder of a cell: what it was made with, and who works on it."""

import json
from pathlib import Path
from typing import Any

from consistency_reg.lab.ablate.grid import Cell, Grid
from consistency_reg.lab.files import write_atomically, write_json
from consistency_reg.lab.recipe_files import DEFAULTS
from consistency_reg.lab.run_folder import Claim
from consistency_reg.optional import require

with require("lightning"):
    import yaml


def fit_arguments(grid: Grid, cell: Cell, config: Path) -> list[str]:
    """Return the arguments of ``consistency-reg fit`` for one cell whose own recipe lies at ``config``."""
    files = [*grid.recipes, config]
    return [argument for file in files for argument in ("--config", str(file))] + ["--run_dir", str(cell.folder)]


def write_config(cell: Cell, path: Path) -> None:
    """Write what the cell changes in the recipe, as a recipe."""
    write_atomically(path, yaml.safe_dump(cell.config, sort_keys=False))


def settings(grid: Grid, cell: Cell) -> dict[str, Any]:
    """Return all that decides a cell's result, and the place of the cell in its grid; ``cell.json`` holds it."""
    recipes = [yaml.safe_load(recipe.read_text()) for recipe in (DEFAULTS, *grid.recipes)]
    content = {"labels": cell.labels, "seed": cell.seed, "overrides": cell.overrides, "recipes": recipes}
    return json.loads(json.dumps(content, default=str))


def refuse_other_settings(grid: Grid, cells: tuple[Cell, ...]) -> None:
    """Raise ValueError if a cell's folder holds a run of other settings: it must be neither reused nor overwritten."""
    for cell in cells:
        folder = cell.run
        if not folder.cell_settings.exists():
            if not folder.is_free:
                raise ValueError(
                    f"{cell.folder} is there already and is no cell of an ablation: change runs, or move it"
                )
            continue
        before, now = json.loads(folder.cell_settings.read_text()), settings(grid, cell)
        if changed := [key for key in now if now[key] != before.get(key)]:
            raise ValueError(
                f"{cell.folder} holds a run made with other {' and '.join(changed)} than {grid.path} asks for now: "
                "remove it, or change runs"
            )


def claim(grid: Grid, cell: Cell) -> Claim | None:
    """Claim a cell, and write its recipe and settings; None if another process works on it or has just finished it."""
    folder = cell.run
    taken = Claim.take(folder)
    if taken is None:
        return None
    try:
        if not folder.is_finished:
            folder.tidy()
            write_config(cell, folder.cell_config)
            write_json(folder.cell_settings, settings(grid, cell))
            return taken
    except BaseException:
        taken.release()
        raise
    taken.release()
    return None
