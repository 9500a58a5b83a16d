"""Write runs as CSV and JSON, the same columns in reports and in committed results, and read them back."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from consistency_reg.lab.files import csv_text, without_nan, write_atomically
from consistency_reg.lab.pricing import rows as prices
from consistency_reg.lab.report.measured import DENSE_PERPLEXITY, PERPLEXITY
from consistency_reg.lab.report.runs import Run, attach, refuse_different_data
from consistency_reg.measures.reading import VALIDATION
from consistency_reg.optional import require

with require("plots"):
    import pandas as pd

NOT_KEPT = ("metrics", "folder", "wandb_dir", "priced")  # columns of their own, of one machine, a file of their own
FIELDS = tuple(field.name for field in fields(Run) if field.name not in NOT_KEPT)
AS_JSON = ("data", "versions", "options", "labels", "curve")
LATER = ("options", "labels", "curve", "device")  # rows that were committed before these were kept lack them
INTEGERS = ("seed", "total_parameters", "active_parameters", "tokens", "steps")
NUMBERS = ("weight", "tokens_per_s", "wall_time_s")


def to_frame(runs: Sequence[Run]) -> "pd.DataFrame":
    """Return a row for each run: its fields, then its metrics; of single domains the perplexity alone."""
    rows: list[dict[str, Any]] = []
    for run in runs:
        row = {name: getattr(run, name) for name in FIELDS}
        row |= {name: json.dumps(row[name], sort_keys=True) for name in AS_JSON}
        rows.append(row | {name: run.metrics[name] for name in _kept_metrics(run)})
    return pd.DataFrame(rows)


def from_frame(frame: "pd.DataFrame") -> list[Run]:
    """Return the runs of a frame of text cells.

    Raises:
        ValueError: a column is missing, or a cell is not what its column holds; names row and column.
    """
    if missing := [name for name in FIELDS if name not in frame and name not in LATER]:
        raise ValueError(f"{missing[0]!r} is missing")
    rows = frame.fillna("").to_dict("records")  # a row that is cut off lacks its last cells
    return [_run(row, f"row {number} ({row['name']})") for number, row in enumerate(rows, start=1)]


def read_csv(path: Path) -> list[Run]:
    """Return the runs of a results CSV, with the prices that are kept next to it.

    Raises:
        ValueError: the file is no results CSV, or has no rows.
    """
    try:
        runs = from_frame(pd.read_csv(path, dtype=str, keep_default_na=False))
    except ValueError as error:
        raise ValueError(f"{path} is no CSV of runs: {error}") from error
    if not runs:
        raise ValueError(f"{path} has no rows")
    beside = prices_beside(path)
    return attach(runs, prices.read(beside)) if beside.exists() else runs


def prices_beside(path: Path) -> Path:
    """Return where the prices of the runs of a results CSV are kept.

    Example:
        >>> prices_beside(Path("results/deployed.csv")).as_posix()
        'results/deployed_priced.csv'
    """
    return path.with_name(f"{path.stem}_priced.csv")


def write_prices(runs: Sequence[Run], path: Path) -> int:
    """Add the prices of the runs to the CSV next to a results CSV, and return how many were added or are new.

    Nothing is written where no run has prices.
    """
    rows, place = [row for run in runs for row in run.priced], prices_beside(path)
    before = prices.read(place) if place.exists() else []
    added = len(prices.merge(before, rows)) - len(before)
    if rows:
        prices.write(place, prices.merge(before, rows))
    return added


def _run(row: Mapping[Any, Any], where: str) -> Run:
    def cell(name: str, kind: Callable[[str], Any], expected: str, empty: str = "") -> Any:
        text = row.get(name, "") or empty
        try:
            return kind(text)
        except (TypeError, ValueError, AttributeError, KeyError):
            raise ValueError(f"{where}: {name} must be {expected}, got {text!r}") from None

    values: dict[str, Any] = {name: row[name] for name in FIELDS if name in row}
    values |= {name: cell(name, float, "a number") for name in NUMBERS}
    values |= {name: cell(name, _integer, "a whole number") for name in INTEGERS}
    values |= {name: cell(name, _object, "a JSON object", "{}") for name in AS_JSON}
    values["data"] = cell("data", _data, "a JSON object whose corpus maps domains to hashes", "{}")
    values["labels"] = {axis: str(label) for axis, label in values["labels"].items()}
    values["curve"] = cell("curve", _curve, "a JSON object of lists of numbers, all of one length", "{}")
    measured = [str(name) for name, text in row.items() if str(name).startswith(f"{VALIDATION}/") and text != ""]
    return Run(**values, metrics={name: cell(name, float, "a number") for name in measured})


def _integer(text: str) -> int:
    """Return a whole number, also as a spreadsheet writes it: 1.2e6."""
    number = float(text)
    if not number.is_integer():
        raise ValueError(text)
    return int(text) if text.strip().lstrip("+-").isdigit() else int(number)


def _object(text: str) -> dict[str, Any]:
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError(text)
    return content


def _data(text: str) -> dict[str, Any]:
    content = _object(text)
    if not isinstance(content.get("corpus", {}), dict):
        raise ValueError(text)
    return content


def _curve(text: str) -> dict[str, list[float]]:
    curve = json.loads(text)
    lengths = {len(values) for values in curve.values()}
    if len(lengths) > 1 or not all(isinstance(value, int | float) for values in curve.values() for value in values):
        raise ValueError(text)
    return curve


def write_csv(runs: Sequence[Run], path: Path) -> None:
    """Write the runs as CSV."""
    write_atomically(path, to_frame(runs).to_csv(index=False, lineterminator="\n"))


def write_json(runs: Sequence[Run], path: Path) -> None:
    """Write the runs as a JSON list, with every metric, also each domain's."""
    records = [
        {**{name: getattr(run, name) for name in FIELDS}, "wandb_dir": run.wandb_dir, "metrics": run.metrics}
        | ({"prices": list(run.priced)} if run.priced else {})
        for run in runs
    ]
    write_atomically(path, json.dumps(without_nan(records), indent=1, allow_nan=False) + "\n")


def append_csv(runs: Sequence[Run], path: Path) -> int:
    """Add a row for each run that the file does not have yet, and return how many were added.

    Raises:
        ValueError: the file is no results CSV; its runs are of other data.
    """
    before = read_csv(path) if path.exists() else []
    have = {_identity(run) for run in before}
    added = [run for run in runs if _identity(run) not in have]
    refuse_different_data([*before, *added] or runs)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_csv([*before, *added], path)
    return len(added)


def fingerprint(runs: Sequence[Run]) -> str:
    """Return a text that is equal for equal rows: it says whether a picture is of the results that it stands beside."""
    priced = [row for run in runs for row in run.priced]
    text = to_frame(runs).to_csv(index=False) + (csv_text(priced) if priced else "")
    return "rows of SHA-256 " + hashlib.sha256(text.encode()).hexdigest()[:16]


def _kept_metrics(run: Run) -> list[str]:
    """Return the names of the metrics over all domains, also each layer's, and of each domain's perplexity."""
    of_domains = tuple(f"/{domain}" for domain in run.domains)
    kept = tuple(f"{measure.name}/" for measure in (PERPLEXITY, DENSE_PERPLEXITY))
    return [name for name in run.metrics if name.startswith(kept) or not name.endswith(of_domains)]


def _identity(run: Run) -> tuple[Any, ...]:
    return run.name, run.seed, run.command, run.git_commit, run.steps, run.wall_time_s
