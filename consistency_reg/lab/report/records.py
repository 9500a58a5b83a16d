"""Runs as CSV and JSON: one row a run, the same columns in reports and in committed results; and back again."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from consistency_reg.lab.files import write_atomically
from consistency_reg.lab.report.runs import PERPLEXITY, Run, refuse_different_data
from consistency_reg.optional import require

with require("plots"):
    import pandas as pd

NOT_KEPT = ("metrics", "folder", "wandb_dir")  # metrics have columns of their own; the others are of one machine
FIELDS = tuple(field.name for field in fields(Run) if field.name not in NOT_KEPT)
AS_JSON = ("data", "versions", "options", "labels", "curve")
LATER = ("options", "labels", "curve", "device")  # rows that were committed before these were kept lack them
NUMBERS = {
    "seed": int,
    "weight": float,
    "total_parameters": int,
    "active_parameters": int,
    "tokens": int,
    "steps": int,
    "tokens_per_s": float,
    "wall_time_s": float,
}


def to_frame(runs: Sequence[Run]) -> "pd.DataFrame":
    """A row for each run: its fields, then its metrics; of single domains the perplexity alone."""
    rows: list[dict[str, Any]] = []
    for run in runs:
        row = {name: getattr(run, name) for name in FIELDS}
        row |= {name: json.dumps(row[name], sort_keys=True) for name in AS_JSON}
        rows.append(row | {name: run.metrics[name] for name in _kept_metrics(run)})
    return pd.DataFrame(rows)


def from_frame(frame: "pd.DataFrame") -> list[Run]:
    """The runs of a frame of text cells."""
    runs = []
    for row in frame.to_dict("records"):
        values: dict[str, Any] = {name: row[name] for name in FIELDS if name in row or name not in LATER}
        values |= {name: json.loads(values.get(name) or "{}") for name in AS_JSON}
        values |= {name: kind(values[name]) for name, kind in NUMBERS.items()}
        metrics = {
            str(name): float(value) for name, value in row.items() if str(name).startswith("val/") and value != ""
        }
        runs.append(Run(**values, metrics=metrics))
    return runs


def read_csv(path: Path) -> list[Run]:
    """The runs of a results CSV.

    Raises:
        ValueError: the file is no results CSV, or has no rows.
    """
    try:
        runs = from_frame(pd.read_csv(path, dtype=str, keep_default_na=False))
    except (KeyError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is no CSV of runs: {reason}") from error
    if not runs:
        raise ValueError(f"{path} has no rows")
    return runs


def write_csv(runs: Sequence[Run], path: Path) -> None:
    """Write the runs as CSV."""
    write_atomically(path, to_frame(runs).to_csv(index=False, lineterminator="\n"))


def write_json(runs: Sequence[Run], path: Path) -> None:
    """Write the runs as a JSON list, with every metric, also each domain's."""
    records = [
        {**{name: getattr(run, name) for name in FIELDS}, "wandb_dir": run.wandb_dir, "metrics": run.metrics}
        for run in runs
    ]
    write_atomically(path, json.dumps(_without_nan(records), indent=1, allow_nan=False) + "\n")


def append_csv(runs: Sequence[Run], path: Path) -> int:
    """Add a row for each run that the file does not have yet; how many were added.

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
    """Equal for equal rows: says whether a picture is of the results that it stands beside."""
    return "rows of SHA-256 " + hashlib.sha256(to_frame(runs).to_csv(index=False).encode()).hexdigest()[:16]


def _kept_metrics(run: Run) -> list[str]:
    """Those over all domains, also each layer's, and each domain's perplexity."""
    of_domains = tuple(f"/{domain}" for domain in run.domains)
    return [name for name in run.metrics if name.startswith(f"{PERPLEXITY}/") or not name.endswith(of_domains)]


def _identity(run: Run) -> tuple[Any, ...]:
    return run.name, run.seed, run.command, run.git_commit, run.steps, run.wall_time_s


def _without_nan(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and content != content else content
