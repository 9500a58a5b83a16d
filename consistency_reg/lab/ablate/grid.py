"""An ablation: which recipe, which keys take which values, which seeds; and the cells that follow from it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from consistency_reg.lab.run_folder import RunFolder

Overrides = dict[str, Any]
Axes = dict[str, dict[str, Overrides]]


@dataclass(frozen=True)
class Cell:
    """Holds one run of an ablation.

    Attributes:
        labels: axis -> label of the value that this cell takes.
        overrides: dotted recipe key -> value, what differs from the recipe.
        seed: of the initial weights and the data order.
        folder: of the run.
    """

    labels: dict[str, str]
    overrides: Overrides
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        """Return the folder's name: the labels and the seed."""
        return self.folder.name

    @property
    def run(self) -> RunFolder:
        """Return the folder of the run with all that is in it."""
        return RunFolder(self.folder)

    @property
    def config(self) -> dict[str, Any]:
        """Return the keys that the cell adds to its recipe, as a recipe."""
        return nest({**self.overrides, "seed_everything": self.seed})


@dataclass(frozen=True)
class Grid:
    """Holds an ablation: every value of every axis with every other, or a list of cells, each with every seed.

    Attributes:
        path: the YAML it came from.
        recipes: the recipe that every cell starts from; later files override earlier ones.
        runs: folder of the cells.
        seeds: the seeds of every cell.
        axes: axis -> label -> what it sets. A list of cells is one axis, "cell".
    """

    path: Path
    recipes: tuple[Path, ...]
    runs: Path
    seeds: tuple[int, ...]
    axes: Axes

    @property
    def name(self) -> str:
        """Return the name that the runs of this ablation share: their wandb group."""
        return self.runs.name

    @property
    def cells(self) -> tuple[Cell, ...]:
        """Return every cell of the grid, the seeds of a cell next to each other."""
        cells = []
        for labels in product(*self.axes.values()):
            values = dict(zip(self.axes, labels, strict=True))
            overrides: Overrides = {}
            for axis, label in values.items():
                overrides |= self.axes[axis][label]
            for seed in self.seeds:
                cells.append(Cell(values, overrides, seed, self.runs / "-".join([*labels, f"seed{seed}"])))
        return tuple(cells)

    def select(self, conditions: Iterable[str]) -> tuple[Cell, ...]:
        """Return the cells with the values that ``AXIS=LABEL`` (or ``seed=N``) of ``conditions`` name.

        Several labels of one axis are alternatives; of several axes all must hold.

        Raises:
            ValueError: an axis or a label that the grid does not have.
        """
        known = {axis: list(values) for axis, values in self.axes.items()} | {"seed": [str(s) for s in self.seeds]}
        wanted: dict[str, set[str]] = {}
        for condition in conditions:
            axis, _, label = condition.partition("=")
            if label not in known.get(axis, ()):
                choices = "; ".join(f"{axis}={'|'.join(labels)}" for axis, labels in known.items())
                raise ValueError(f"--only takes {choices}; got {condition!r}")
            wanted.setdefault(axis, set()).add(label)
        return tuple(
            cell
            for cell in self.cells
            if all({**cell.labels, "seed": str(cell.seed)}[axis] in labels for axis, labels in wanted.items())
        )


def nest(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return dotted keys as nested mappings; a longer key goes into the value of a shorter one.

    Example:
        >>> nest({"a.b.c": 1, "a.b": {"d": 2}})
        {'a': {'b': {'d': 2, 'c': 1}}}
    """
    nested: dict[str, Any] = {}
    for key in sorted(overrides, key=lambda key: key.count(".")):
        *parents, last = key.split(".")
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise ValueError(f"{key} cannot be set inside {parent}, which is set to {place!r}")
        value = overrides[key]
        place[last] = dict(value) if isinstance(value, dict) else value
    return nested
