"""The YAML file of an ablation, and all that can be wrong with it."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from consistency_reg.lab.ablate.grid import Axes, Grid, Overrides, nest
from consistency_reg.lab.files import check_name
from consistency_reg.lab.recipe_files import find_recipe, shipped_recipe
from consistency_reg.optional import require

with require("lightning"):
    import yaml

OURS = ("seed_everything", "run_dir")


def load_grid(given: str | Path) -> Grid:
    """Read an ablation.

    Args:
        given: its file, or the name of one that comes with this package.

    The file::

        recipe: ../quickstart.yaml     # relative to this file, or a shipped name; of a list the later ones win
        runs: runs/demo                # relative to the folder that the command runs in
        seeds: [0, 1]                  # [0] when left out
        grid:                          # axes: every value with every other
          shared:                      # one key, labelled values (a plain list labels itself)
            key: model.model.init_args.shared_experts
            values: {none: 0, one: 1}
          loss:                        # no key: each value sets several keys
            values:
              plain: {consistency.weight: 0}
              srp: {consistency.weight: 0.3, consistency.loss: {class_path: consistency_reg.LocalConsistencyLoss}}
          model.learning_rate: [0.001, 0.003]       # the shortest form
        cells:                         # or, instead of grid, a list
          - {name: baseline, overrides: {consistency.weight: 0}}

    Raises:
        FileNotFoundError: no such file, or no such recipe.
        ValueError: what is wrong with the file, and where.
    """
    path = find_recipe(given, "ablations")
    content = _read_yaml(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected the keys recipe, runs, seeds, grid or cells, got {type(content).__name__}")
    _no_other_keys(path, "the file", content, ("recipe", "runs", "seeds", "grid", "cells"))
    for key in ("recipe", "runs"):
        if not content.get(key):
            raise ValueError(f"{path}: {key} is missing")
    if ("grid" in content) == ("cells" in content):
        raise ValueError(f"{path}: expected either grid or cells, got {'both' if 'grid' in content else 'neither'}")
    axes = _axes(path, content["grid"]) if "grid" in content else {"cell": _listed(path, content["cells"])}
    grid = Grid(
        path, _recipes(path, content["recipe"]), Path(content["runs"]).expanduser(), _seeds(path, content), axes
    )
    for cell in grid.cells:
        try:
            nest(cell.overrides)
        except ValueError as error:
            raise ValueError(f"{path}: cell {cell.name}: {error}") from error
    names = [cell.name for cell in grid.cells]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{path}: cells must differ in their names, got more than one {', '.join(repeated)}")
    return grid


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error


def _recipes(path: Path, names: Any) -> tuple[Path, ...]:
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: recipe must be a file or a list of files, got {names!r}")
    return tuple(_recipe(path, name) for name in names)


def _recipe(path: Path, name: str) -> Path:
    beside = Path(os.path.normpath(path.parent / name))
    if beside.is_file():
        return beside
    try:
        return shipped_recipe(beside if "/" in name else name)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: {error}") from None


def _seeds(path: Path, content: Mapping[str, Any]) -> tuple[int, ...]:
    seeds = content.get("seeds", [0])
    whole = isinstance(seeds, list) and all(isinstance(seed, int) and not isinstance(seed, bool) for seed in seeds)
    if not (whole and seeds and len(set(seeds)) == len(seeds)):
        raise ValueError(f"{path}: seeds must be a list of different integers, got {seeds!r}")
    return tuple(seeds)


def _axes(path: Path, grid: Any) -> Axes:
    if not isinstance(grid, dict) or not grid:
        raise ValueError(f"{path}: grid must hold at least one axis, got {grid!r}")
    axes: Axes = {}
    for name, spec in grid.items():
        axis = str(name).rpartition(".")[2]
        if axis in axes or axis == "seed":
            raise ValueError(
                f"{path}: axis {axis!r} must have a name of its own: write `name: {{key: ..., values: ...}}`"
            )
        axes[axis] = _axis(path, f"grid.{name}", {"key": name, "values": spec} if isinstance(spec, list) else spec)
    setters: dict[str, str] = {}
    for axis, values in axes.items():
        for key in {key for overrides in values.values() for key in overrides}:
            if setters.setdefault(key, axis) != axis:
                raise ValueError(f"{path}: the axes {setters[key]!r} and {axis!r} both set {key}")
    return axes


def _axis(path: Path, where: str, spec: Any) -> dict[str, Overrides]:
    if not isinstance(spec, dict) or "values" not in spec:
        raise ValueError(f"{path}: {where} must be a list of values, or a mapping with values, got {spec!r}")
    _no_other_keys(path, where, spec, ("key", "values"))
    key, values = spec.get("key"), spec["values"]
    if isinstance(values, list) and key is not None:
        values = {value if isinstance(value, str) else str(value).lower(): value for value in values}
    if not isinstance(values, dict) or not values:
        raise ValueError(f"{path}: {where}.values must hold at least one value under its label, got {values!r}")
    axis = {}
    for label, value in values.items():
        overrides = value if key is None else {key: value}
        axis[_label(path, where, label)] = _overrides(path, f"{where}.values.{label}", overrides)
    return axis


def _listed(path: Path, cells: Any) -> dict[str, Overrides]:
    if not isinstance(cells, list) or not cells:
        raise ValueError(f"{path}: cells must be a list of at least one {{name, overrides}}, got {cells!r}")
    listed: dict[str, Overrides] = {}
    for index, cell in enumerate(cells):
        where = f"cells[{index}]"
        if not isinstance(cell, dict) or "name" not in cell:
            raise ValueError(f"{path}: {where} must be {{name, overrides}}, got {cell!r}")
        _no_other_keys(path, where, cell, ("name", "overrides"))
        name = _label(path, where, cell["name"])
        if name in listed:
            raise ValueError(f"{path}: cells must differ in their names, got more than one {name}")
        listed[name] = _overrides(path, f"{where}.overrides", cell.get("overrides", {}))
    return listed


def _label(path: Path, where: str, label: Any) -> str:
    if isinstance(label, bool):
        raise ValueError(f"{path}: {where}: YAML reads on, off, yes and no as true and false: put the label in quotes")
    try:
        return check_name("a value, which is part of a folder's name,", label)
    except ValueError as error:
        raise ValueError(f"{path}: {where}: {error}: write `values: {{LABEL: value}}`") from error


def _overrides(path: Path, where: str, overrides: Any) -> Overrides:
    if not isinstance(overrides, dict) or not all(isinstance(key, str) for key in overrides):
        raise ValueError(f"{path}: {where} must map recipe keys to values, got {overrides!r}")
    for key in OURS:
        if key in overrides:
            raise ValueError(f"{path}: {where} must not set {key}: seeds and runs do")
    return overrides


def _no_other_keys(path: Path, where: str, content: Mapping[str, Any], known: tuple[str, ...]) -> None:
    if unknown := [str(key) for key in content if key not in known]:
        raise ValueError(f"{path}: {where} knows the keys {', '.join(known)}, got {', '.join(unknown)}")
