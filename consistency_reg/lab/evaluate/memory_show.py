"""Show what is predicted within a memory budget: a table and a picture."""

import math
from collections.abc import Sequence

from consistency_reg.lab.evaluate.memory import Row, Within
from consistency_reg.lab.render.palette import COLOURS
from consistency_reg.lab.render.png import panels
from consistency_reg.lab.render.table import Table, in_bytes, number, percent
from consistency_reg.optional import require

with require("plots"):
    from matplotlib.figure import Figure

SPEEDS = ("tokens_per_s", "belady_tokens_per_s", "twice_tokens_per_s")


def table(rows: Sequence[Row]) -> Table:
    """Return all budgets as a table for the terminal."""
    header = ["model", "memory", "slots a layer", "hits (%)", "misses a token", "loads a token", "tokens/s"]
    header += ["with Belady", "with twice the slots", "what it waits for"]
    shown = [
        [
            row["model"],
            in_bytes(row["memory_bytes"]),
            str(row["slots"]),
            percent(row.get("hit_rate", math.nan)),
            number(2)(row.get("misses", math.nan)),
            in_bytes(row["loaded_bytes"]) if "loaded_bytes" in row else "",
            *(_speed(row.get(name, math.nan)) for name in SPEEDS),
            row["advice"],
        ]
        for row in rows
    ]
    return Table(
        "Within a memory budget", header, shown, _note(rows), gives_way=("misses a token", "with twice the slots")
    )


def _speed(value: float) -> str:
    return "no reads" if math.isinf(value) else number(2)(value)


def _note(rows: Sequence[Row]) -> str:
    first = rows[0]
    compute = first["compute_seconds"]
    computing = "without computing" if compute is None else f"{1e3 * compute:g} ms of computing"
    return "; ".join(
        [
            f"predicted for reads of {in_bytes(first['read_bytes_per_s'])}/s, {computing}: an LRU cache for each "
            "layer, empty at each document, first uses read",
            "policy: Belady would save more than twice the slots; working set: less",
            "below the cliff: LRU hits less than a fixed set drawn blindly",
            *map(_of_model, {row["model"]: row for row in rows}.values()),
        ]
    )


def _of_model(row: Row) -> str:
    kv = f"{in_bytes(row['kv_bytes'])} of KV cache" if row["kv_bytes"] else "a KV cache that is not known"
    slots = row["cliff_slots"]
    cliff = "no cache pays" if slots is None else f"a cache pays from {slots} slots on ({in_bytes(row['cliff_bytes'])})"
    return f"{row['model']}: {in_bytes(row['dense_bytes'])} of other weights, {kv}, {cliff}"


def figure(models: Sequence[Within], rows: Sequence[Row]) -> Figure:
    """Return predicted tokens/s by memory, of LRU and of Belady, with the budgets marked."""
    drawn, (axes,) = panels(1, 1, 6.5, 4.2)
    for one, colour in zip(models, COLOURS * len(models), strict=False):
        memory = [one.needs.memory(slots) / 1e9 for slots in one.sizes]
        for policy, style, label in (("lru", "-", one.model), ("belady", ":", f"{one.model}, Belady")):
            axes.plot(
                memory, [one.tokens_per_s(policy, slots) for slots in one.sizes], style, color=colour, label=label
            )
        at = [row for row in rows if row["model"] == one.model and math.isfinite(row.get("tokens_per_s", math.nan))]
        axes.plot([row["memory_bytes"] / 1e9 for row in at], [row["tokens_per_s"] for row in at], "o", color=colour)
    axes.set(xlabel="memory for weights, KV cache and slots [GB]", ylabel="predicted tokens/s")
    axes.set_yscale("log")
    axes.legend(frameon=False)
    return drawn
