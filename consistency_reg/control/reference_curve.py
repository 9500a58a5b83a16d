"""The values that another run logged, by step."""

import csv
import json
import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ReferenceCurve:
    """Holds the values that another run logged, at some of its steps.

    Args:
        steps: in ascending order.
        values: at each of them, > 0.

    Raises:
        ValueError: no value at all, or one that is not a positive number.

    Example:
        >>> curve = ReferenceCurve([100, 200], [5.0, 4.0])
        >>> curve.at(150, interpolate=True), curve.at(150, interpolate=False), curve.at(300, interpolate=True)
        (4.5, None, None)
    """

    steps: Sequence[int]
    values: Sequence[float]

    def __post_init__(self) -> None:
        if not self.steps or len(self.steps) != len(self.values):
            raise ValueError(f"a reference must have a value for each step, got {len(self.values)}, {len(self.steps)}")
        if not all(math.isfinite(value) and value > 0 for value in self.values):
            raise ValueError("the values of a reference must be finite numbers > 0")

    @classmethod
    def read(cls, path: Path, name: str) -> "ReferenceCurve":
        """Read a value's curve.

        Args:
            path: the folder of a run (see :func:`metrics_files`), a CSV with the columns ``step`` and ``name``, as
                Lightning's CSVLogger writes it, or a JSON that maps ``step`` and ``name`` to lists.
            name: of the value.

        Raises:
            FileNotFoundError: no such file, or no metrics in the folder.
            ValueError: the file does not hold the curve; the message says what it holds.
        """
        files = metrics_files(path) if path.is_dir() else [path]
        if not files:
            raise FileNotFoundError(f"reference {path} is no run: it has no metrics.csv")
        columns: set[str] = set()
        points: dict[int, float] = {}
        for file in files:
            for row in _rows(file):
                columns |= row.keys()
                if row.get(name) not in (None, "") and row.get("step") not in (None, ""):
                    points[int(float(row["step"]))] = float(row[name])  # a resumed run wrote its last steps twice
        if not points:
            has = ", ".join(sorted(columns)) or "nothing"
            raise ValueError(f"reference {path} must hold step and {name}, it holds {has}")
        return cls(sorted(points), [points[step] for step in sorted(points)])

    def at(self, step: int, *, interpolate: bool) -> float | None:
        """Return the value at a step; None outside of the curve, and between its points unless ``interpolate``."""
        index = bisect_left(self.steps, step)
        if index == len(self.steps):
            return None
        if self.steps[index] == step:
            return self.values[index]
        if index == 0 or not interpolate:
            return None
        share = (step - self.steps[index - 1]) / (self.steps[index] - self.steps[index - 1])
        return self.values[index - 1] + share * (self.values[index] - self.values[index - 1])


def metrics_files(folder: Path) -> list[Path]:
    """Return the files of a run's log in order: metrics-1.csv, ... until interruptions, then metrics.csv."""
    numbers = {path: path.stem.removeprefix("metrics-") for path in folder.glob("metrics-*.csv")}
    earlier = sorted((path for path in numbers if numbers[path].isdecimal()), key=lambda path: int(numbers[path]))
    return [path for path in (*earlier, folder / "metrics.csv") if path.exists()]


def _rows(file: Path) -> Iterable[Mapping[str, Any]]:
    if file.suffix != ".json":
        with file.open(newline="") as lines:
            return list(csv.DictReader(lines))
    try:
        columns = json.loads(file.read_text())
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"reference {file} must be a JSON that maps names to lists of one length: {error}") from error
