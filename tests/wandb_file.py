"""Read offline wandb runs back: a log in LevelDB's format whose entries are wandb's own protobuf records.

wandb has no reader in Python since 0.30; its Go code reads the same way (core/internal/transactionlog): records up to
one that is cut off, as by a kill.
"""

import json
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from wandb.proto import wandb_internal_pb2

BLOCK, HEADER = 32768, 7
FULL, FIRST, _, LAST = 1, 2, 3, 4


@dataclass
class OfflineRun:
    """Holds what one process logged: ``history`` a dict for each row, ``axes`` the step metric of each defined name."""

    folder: Path
    id: str = ""
    name: str = ""
    config: dict = field(default_factory=dict)
    history: list[dict] = field(default_factory=list)
    summary: dict = field(default_factory=dict)
    axes: dict[str, str] = field(default_factory=dict)
    artifacts: list[tuple[str, str, list[str]]] = field(default_factory=list)  # type, name, files
    alerts: list[str] = field(default_factory=list)  # titles
    finished: bool = False

    def table(self, key: str) -> dict:
        """Return the last table under a key: its ``columns`` and ``data``."""
        (*_, row) = (row for row in self.history if key in row)
        return json.loads((self.folder / "files" / row[key]["path"]).read_text())

    def images(self, key: str) -> list[Path]:
        """Return the files of all images under a key, in the order of the rows."""
        return [self.folder / "files" / row[key]["path"] for row in self.history if key in row]


def records(path: Path) -> Iterator[wandb_internal_pb2.Record]:
    data, position, parts = path.read_bytes(), HEADER, []
    while position + HEADER <= len(data):
        if BLOCK - position % BLOCK < HEADER:  # the rest of a block is too short for a header: padding
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        if position + HEADER + length > len(data):  # cut off
            return
        parts = [] if kind in (FULL, FIRST) else parts
        parts.append(data[position + HEADER : position + HEADER + length])
        position += HEADER + length
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b"".join(parts))
            yield record


def _set(tree: dict, item) -> None:
    keys = list(item.nested_key) or [item.key]
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
    tree[keys[-1]] = json.loads(item.value_json)


def read_file(path: Path) -> OfflineRun:
    run = OfflineRun(path.parent)
    for record in records(path):
        run.id = record.run.run_id or run.id
        run.name = record.run.display_name or run.name
        for update in (*record.config.update, *record.run.config.update):
            _set(run.config, update)
        for update in record.summary.update:
            _set(run.summary, update)
        if record.HasField("metric"):
            run.axes[record.metric.name or record.metric.glob_name] = record.metric.step_metric
        if record.HasField("alert"):
            run.alerts.append(record.alert.title)
        if record.HasField("artifact"):
            files = [entry.path for entry in record.artifact.manifest.contents]
            run.artifacts.append((record.artifact.type, record.artifact.name, files))
        if record.history.item:
            row: dict = {}
            for item in record.history.item:
                _set(row, item)
            run.history.append(row)
        run.finished |= record.HasField("exit")
    return run


def read_runs(folder: Path) -> list[OfflineRun]:
    """Return the offline runs below ``folder`` in the order they began: an interrupted run has more than one."""
    return [read_file(path) for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"))]


def read_run(folder: Path) -> OfflineRun:
    """Return the one offline run below ``folder``, when it has finished."""
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    for _ in range(200):  # wandb's process may still write when ``finish`` has returned
        if (run := read_file(path)).finished:
            break
        time.sleep(0.05)
    return run
