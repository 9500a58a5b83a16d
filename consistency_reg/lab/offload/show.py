"""Show the measures of offloaded models as a table, as files and as a picture."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from consistency_reg.lab.files import csv_text, without_nan
from consistency_reg.lab.offload.measure import Measured
from consistency_reg.lab.render.palette import COLOURS
from consistency_reg.lab.render.png import panels, png
from consistency_reg.lab.render.table import Table, in_bytes, multiple, number, percent
from consistency_reg.optional import require

with require("plots"):
    import pandas as pd

COLUMNS = ("model", "prompt", "token", "ms", "hits", "misses", "bytes_read", "ms_waiting")
PICTURE = "token_time"
NOTE = (
    "Decode, one token at a time from empty slots: tokens/s and quantiles of a token; hits are experts that were in a "
    "slot; waiting is the share of the time in which nothing could be computed. 'of first' compares with the first row."
)
PREDICTED = (
    " Predicted: misses x bytes of an expert / bandwidth of random reads + a token's computing with every expert "
    "there, both measured just before; 'disk' is what the same reads give when nothing holds them back."
)


def tables(measured: Sequence[Measured]) -> list[Table]:
    """Return one table with a row for each model."""
    header = ["model", "slots", "tokens/s", "of first", "p50 ms", "p95 ms", "p99 ms", "MB/token", "hits %", "waiting %"]
    header += ["prefill tokens/s"]
    calibrated = any(one.calibration is not None for one in measured)
    read = any("perplexity" in one.numbers for one in measured)
    header += ["perplexity"] if read else []
    header += ["predicted tokens/s", "reads GB/s", "disk GB/s", "compute ms"] if calibrated else []
    first = measured[0].numbers["decode_tokens_per_s"]
    rows = [_row(one, first, read=read, calibrated=calibrated) for one in measured]
    memory = "; ".join(f"{one.name}: {_memory(one.about)}" for one in measured)
    note = f"{NOTE}{PREDICTED if calibrated else ''} Memory of {memory}."
    return [Table("Experts on this device", header, rows, note, gives_way=("waiting %", "p95 ms"))]


def _row(one: Measured, first: float, *, read: bool, calibrated: bool) -> list[str]:
    found = one.numbers
    slots = one.about["slots"]
    shown = [one.name, str(slots[0]) if len(set(slots)) == 1 else ",".join(map(str, slots))]
    shown += [number(1)(found["decode_tokens_per_s"]), multiple(found["decode_tokens_per_s"] / first)]
    shown += [number(1)(found[name]) for name in ("p50_ms", "p95_ms", "p99_ms")]
    shown += [number(2)(found["mb_per_token"]), percent(found["hit_rate"]), percent(found["waiting_share"])]
    shown += [number(1)(found["prefill_tokens_per_s"])]
    shown += [number(2)(found.get("perplexity", math.nan))] if read else []
    names = ((1, "predicted_tokens_per_s"), (2, "read_gb_per_s"), (2, "native_gb_per_s"), (2, "compute_ms"))
    return shown + ([number(digits)(found.get(name, math.nan)) for digits, name in names] if calibrated else [])


def _memory(about: dict[str, Any]) -> str:
    return (
        f"{in_bytes(about['dense_bytes'])} always there, {in_bytes(about['slot_bytes'])} of slots, "
        f"{in_bytes(about['buffer_bytes'])} of buffers for reading"
    )


def to_json(measured: Sequence[Measured], about: dict[str, Any]) -> str:
    """Return everything: options, numbers, texts, and each token."""
    models = [
        {
            "model": one.name,
            **one.about,
            "numbers": without_nan(one.numbers),
            "calibration": None if one.calibration is None else asdict(one.calibration),
            "texts": list(one.texts),
            "tokens": one.token_rows(),
        }
        for one in measured
    ]
    return json.dumps({**about, "models": models}, indent=1) + "\n"


def to_csv(measured: Sequence[Measured]) -> str:
    """Return a row for each token."""
    return csv_text((row for one in measured for row in one.token_rows()), COLUMNS)


def token_time(measured: Sequence[Measured]) -> bytes:
    """Return a picture of each token's time against its misses; the line is the mean of tokens with as many."""
    figure, (axes,) = panels(1, 1, 6.5, 4.2)
    for one, colour in zip(measured, COLOURS * len(measured), strict=False):
        tokens = pd.DataFrame(one.token_rows())
        axes.scatter(tokens["misses"], tokens["ms"], s=8, alpha=0.3, color=colour, linewidths=0)
        means = tokens.groupby("misses")["ms"].mean()
        axes.plot(means.index, means, "o-", color=colour, markersize=4, label=one.name)
        if one.calibration is not None:
            floor = [1e3 * one.calibration.seconds_per_token(misses) for misses in means.index]
            axes.plot(means.index, floor, ":", color=colour, label=f"{one.name}, predicted")
    axes.set(xlabel="experts of the token that had to be read", ylabel="time of the token [ms]")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return png(figure)
