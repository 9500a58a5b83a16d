"""Read and write the rows of pricing: one CSV row for each model, cache and strength, with where it came from."""

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from consistency_reg.lab.files import csv_text, write_atomically
from consistency_reg.lab.provenance import device_name, git_commit, package_versions

Row = dict[str, Any]
NEEDED = ("run", "seed", "method", "strength", "cache_ratio", "perplexity", "misses")
TEXTS = ("run", "model", "loss", "domains", "method", "command", "git_commit", "versions", "device")
WHOLE = ("seed", "guaranteed", "slots")
POINT = ("run", "seed", "domains", "method", "guaranteed", "cache_ratio", "strength")  # what tells two rows apart


def origin(command: str, device: str = "cpu") -> Row:
    """Return the columns that say how a row was made: command, commit, versions and device."""
    return {
        "command": command,
        "git_commit": git_commit(),
        "versions": json.dumps(package_versions()),
        "device": device_name(torch.device(device)),
    }


def with_changes(rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Return the rows with "perplexity_change" and "misses_change" against the same model as it is.

    Args:
        rows: rows of pricing; one of strength 0 for each model and cache, or the changes of the others are NaN.
    """
    base = {_as_it_is(row): row for row in rows if not row["strength"]}
    return [dict(row) | _changes(row, base.get(_as_it_is(row))) for row in rows]


def _as_it_is(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in ("model", "run", "seed", "domains", "cache_ratio"))


def _changes(row: Mapping[str, Any], base: Mapping[str, Any] | None) -> Row:
    return {
        f"{name}_change": row[name] / base[name] - 1 if base and base[name] else math.nan
        for name in ("perplexity", "misses")
    }


def point(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what tells a row apart from all others; every method and guarantee is one at strength 0."""
    at_all = {} if row["strength"] else {"method": "", "guaranteed": 1}
    return tuple({"domains": "", "guaranteed": 1, **row, **at_all}[name] for name in POINT)


def merge(*groups: Iterable[Row]) -> list[Row]:
    """Return the rows of all groups, of two rows at the same point the later one."""
    return list({point(row): row for group in groups for row in group}.values())


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows to a CSV file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, csv_text(rows))


def holds_prices(path: Path) -> bool:
    """Return whether a file is a CSV of pricing, judged by its header."""
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        header = next(csv.reader(file), [])
    return set(NEEDED) <= set(header)


def read(path: Path) -> list[Row]:
    """Return the rows of a CSV of pricing, with numbers as numbers.

    Raises:
        ValueError: a column is missing, or a cell is not the number that its column holds; names row and column.
    """
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if missing := [name for name in NEEDED if name not in (reader.fieldnames or ())]:
            raise ValueError(f"{path} is no CSV of prices: {missing[0]!r} is missing")
        return [_typed(row, f"{path}, row {place}") for place, row in enumerate(reader, start=1)]


def _typed(row: Mapping[str, str | None], where: str) -> Row:
    return {name: _cell(name, text or "", where) for name, text in row.items() if name is not None}


def _cell(name: str, text: str, where: str) -> Any:
    if name in TEXTS:
        return text
    try:
        if name in WHOLE and text:
            return int(float(text))
        return float(text) if text or name in NEEDED else math.nan
    except ValueError:
        raise ValueError(f"{where}: {name} must be a number, got {text!r}") from None
