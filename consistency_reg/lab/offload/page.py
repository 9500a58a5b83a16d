"""The benchmark of offloading as tables of a page: ``python -m consistency_reg.lab.offload.page PAGE``."""

import csv
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from consistency_reg.byte_sizes import show_bytes
from consistency_reg.lab.render.markdown import update
from consistency_reg.lab.render.table import Table, change, multiple, number, percent

SOURCE = "recipes/results/offload.csv"


@dataclass(frozen=True)
class Row:
    """Holds the measurements of one arm with one number of slots, as ``recipes/benchmarks/offload.py`` writes it.

    Attributes:
        place: what experts were read from: the disk, or a slower one that is emulated, of which machine.
        arm: the model.
        bias: strength of the bias towards experts in slots.
        ratio: slots of a layer / K; infinite for all experts.
        numbers: the measurements, medians over the repeats.
    """

    place: "Place"
    arm: str
    bias: float
    ratio: float
    numbers: dict[str, float]


@dataclass(frozen=True)
class Place:
    """Names the storage that experts were read from.

    Attributes:
        bandwidth: bytes per second that reads were held back to, infinite for as fast as the disk.
        machine: the processor, its threads that computed, and the disk.
    """

    bandwidth: float
    machine: str

    def __str__(self) -> str:
        return "the disk" if math.isinf(self.bandwidth) else f"{show_bytes(self.bandwidth)}/s"


def main(argv: Sequence[str] | None = None) -> int:
    """Renew the tables in each page that is named."""
    tables = benchmark_tables(read_rows(Path(SOURCE)))
    for page in sys.argv[1:] if argv is None else argv:
        update(Path(page), SOURCE, tables)
    return 0


def read_rows(path: Path) -> list[Row]:
    """Return the rows of the benchmark; of several for the same arm, slots and place the last one."""
    found = {}
    with path.open(newline="", encoding="utf-8") as file:
        for cells in csv.DictReader(file):
            machine = f"{cells['device']}, threads: {cells['threads']}, {cells['file_system']} on {cells['disk']}"
            place = Place(1e9 * float(cells["emulated_gb_per_s"] or math.inf), machine)
            numbers = {name: value for name, text in cells.items() if not math.isnan(value := _number(text))}
            row = Row(place, cells["arm"], numbers["bias"], numbers["cache_ratio"], numbers)
            found[row.place, row.arm, row.bias, row.ratio] = row
    return list(found.values())


def benchmark_tables(rows: Sequence[Row]) -> list[Table]:
    """Return two tables for each place: tokens/s of every arm by slots, and what a token takes."""
    tables = []
    for place in dict.fromkeys(row.place for row in rows):
        here = [row for row in rows if row.place == place]
        named = f"from {place}" if math.isinf(place.bandwidth) else f"at {place}"
        if any(str(other) == str(place) and other != place for other in {row.place for row in rows}):
            named += f", {place.machine}"
        tables += [by_slots(f"Decoding {named}: tokens/s by slots", here), a_token(f"Decoding {named}: a token", here)]
    return tables


def by_slots(title: str, rows: Sequence[Row]) -> Table:
    """Return tokens/s of each arm in a column for each number of slots, with the ratio to the baseline's."""
    ratios = sorted({row.ratio for row in rows})
    table = Table(title, ["arm", "bias", *map(_slots, ratios)])
    for arm, bias in _arms(rows):
        at = {row.ratio: row.numbers for row in rows if (row.arm, row.bias) == (arm, bias)}
        cells = [_against(at[ratio]) if ratio in at else "" for ratio in ratios]
        table.rows.append([arm, _bias(bias), *cells])
    return table


def a_token(title: str, rows: Sequence[Row]) -> Table:
    """Return a row for each number of slots and arm: what a token reads, how long it takes and what was predicted.

    Predicted is the floor of the benchmark: bytes missed at the measured bandwidth, and computing without misses.
    """
    header = ["slots", "arm", "bias", "misses a token", "hits (%)", "MB a token", "tokens/s", "over baseline's"]
    header += ["p50, ms", "p99, ms", "predicted tokens/s", "time over predicted", "perplexity"]
    table = Table(title, header)
    order = {key: place for place, key in enumerate(_arms(rows))}
    for row in sorted(rows, key=lambda row: (row.ratio, order[row.arm, row.bias])):
        of = row.numbers
        table.rows.append(
            [
                *(_slots(row.ratio), row.arm, _bias(row.bias)),
                number(2)(of["misses_per_token"]),
                percent(of["hit_rate"]),
                number(1)(of["mb_per_token"]),
                _rate(of["median"]),
                multiple(of["speed_up_median"]),
                *(number(1)(of[name]) for name in ("p50_ms", "p99_ms")),
                _rate(of["predicted_tokens_per_s"]),
                number(2)(of["over_floor_median"]),
                change(of["perplexity_change"]),
            ]
        )
    return table


def _arms(rows: Iterable[Row]) -> list[tuple[str, float]]:
    """Return every arm and bias, arms in the order of the file and the weakest bias first."""
    arms = list(dict.fromkeys(row.arm for row in rows))
    return sorted({(row.arm, row.bias) for row in rows}, key=lambda key: (arms.index(key[0]), key[1]))


def _against(of: Mapping[str, float]) -> str:
    return f"{_rate(of['median'])} ({multiple(of['speed_up_median'])})"


def _rate(tokens_per_s: float) -> str:
    return number(1 if tokens_per_s >= 10 else 2)(tokens_per_s)


def _slots(ratio: float) -> str:
    return "all" if math.isinf(ratio) else f"{ratio:g}K"


def _bias(strength: float) -> str:
    return f"{strength:g}" if strength else ""


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


if __name__ == "__main__":
    sys.exit(main())
