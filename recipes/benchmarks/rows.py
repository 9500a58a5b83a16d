"""What every benchmark row says of where it came from, and how rows are kept."""

import csv
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from consistency_reg.lab.provenance import device_name, git_commit, package_versions

RESULTS = Path(__file__).parents[1] / "results"


def quantiles(values: list[float]) -> dict[str, float]:
    """Median with the 20% and 80% quantiles, as keys of a row."""
    low, middle, high = torch.tensor(values).double().quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist()
    return {"p20": low, "median": middle, "p80": high, "runs": len(values)}


def append(name: str, rows: list[dict[str, Any]]) -> None:
    """Print rows and add them to recipes/results/NAME.csv with command, commit, device, versions and time."""
    versions = package_versions()
    origin = {
        "command": " ".join(["python", *sys.argv]),
        "git_commit": git_commit(),
        "device": device_name("cuda" if torch.cuda.is_available() else "cpu"),
        "threads": torch.get_num_threads(),
        "torch": versions["torch"],
        "transformers": versions.get("transformers", ""),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    path = RESULTS / f"{name}.csv"
    path.parent.mkdir(exist_ok=True)
    fields = [*rows[0], *origin]
    for row in rows:
        print({key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()})
    new = not path.exists()
    if not new and (header := path.read_text().splitlines()[0].split(",")) != fields:
        raise SystemExit(f"{path} holds rows of other columns, {header}, not {fields}: move it away")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fields)
        if new:
            writer.writeheader()
        writer.writerows(row | origin for row in rows)
