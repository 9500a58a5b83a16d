"""Read an offline wandb run back: a log in LevelDB's format whose entries are wandb's own protobuf records."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

from wandb.proto import wandb_internal_pb2

BLOCK, HEADER = 32768, 7
FULL, FIRST, _, LAST = 1, 2, 3, 4


def records(path: Path) -> Iterator[wandb_internal_pb2.Record]:
    data, position, parts = path.read_bytes(), HEADER, []
    while position + HEADER <= len(data):
        if BLOCK - position % BLOCK < HEADER:  # the rest of a block is too short for a header: padding
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts = [] if kind in (FULL, FIRST) else parts
        parts.append(data[position + HEADER : position + HEADER + length])
        position += HEADER + length
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b"".join(parts))
            yield record


def read_run(folder: Path) -> tuple[dict, list[dict]]:
    """(config, history) of the one offline run below ``folder``."""
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    config, history = {}, []
    for record in records(path):
        for update in (*record.config.update, *record.run.config.update):
            config[update.key or ".".join(update.nested_key)] = json.loads(update.value_json)
        if record.history.item:
            row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            history.append(row)
    return config, history
