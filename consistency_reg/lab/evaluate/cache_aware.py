"""Price cache-aware routing on the text that a model is judged on: rows, a table, a picture and a sentence."""

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from consistency_reg.lab.evaluate.deployed import price
from consistency_reg.lab.evaluate.models import Candidate
from consistency_reg.lab.evaluate.text import Rows
from consistency_reg.lab.render.palette import COLOURS
from consistency_reg.lab.render.png import panels
from consistency_reg.lab.render.table import Table, change, in_bytes, number, percent
from consistency_reg.optional import require

with require("plots"):
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

BATCH_ROWS = 8
MOST_COST = 0.005  # of perplexity, relative
NOTE = (
    "changes against the model as it is; misses of an LRU cache for each layer, as in the hit rates; loads count first "
    "uses too; agreement: share of the experts that the model would have chosen itself"
)


def priced(
    candidate: Candidate,
    texts: Mapping[str, Rows],
    strengths: Sequence[float],
    cache_ratios: Sequence[float],
    method: str,
    batch_size: int | None = None,
) -> list[dict[str, Any]]:
    """Return a row for each cache ratio and strength, the model as it is (strength 0) first at each ratio.

    Args:
        candidate: a causal model with its head.
        texts: token ids by domain.
        strengths: of :class:`~consistency_reg.CacheAwareRouting`.
        cache_ratios: slots of each layer's cache, in units of its K.
        method: "prior", "max_rank" or "cumulative".
        batch_size: rows that are read at once.

    Raises:
        ValueError: a model that does not predict tokens; settings that are refused, before the first forward.
    """
    if not candidate.predicts:
        raise ValueError(
            f"--cache-aware needs a causal model with its head, for its perplexity: {candidate.name} is none"
        )
    batches = {domain: list(_batches(rows, batch_size or BATCH_ROWS)) for domain, rows in texts.items()}
    every = [0.0, *(strength for strength in strengths if strength)]
    rows = list(price(candidate.model, batches, every, cache_ratios, method))
    base = {row["cache_ratio"]: row for row in rows if row["strength"] == 0}
    return [_against(row, base[row["cache_ratio"]]) | {"model": candidate.name} for row in rows]


def _against(row: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    relative = {name: row[name] / base[name] - 1 if base[name] else math.nan for name in ("perplexity", "misses")}
    return row | {f"{name}_change": value for name, value in relative.items()}


def _batches(rows: Rows, size: int) -> Iterator[dict[str, Tensor]]:
    """Yield rows of similar length as batches; what pads them comes after every real token and has no label."""
    ordered = sorted((torch.tensor(row) for row in rows if len(row) > 1), key=len)
    for first in range(0, len(ordered), size):
        part = ordered[first : first + size]
        ids = torch.nn.utils.rnn.pad_sequence(part, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in part], batch_first=True)
        yield {"input_ids": ids, "labels": ids.where(mask.bool(), -100), "attention_mask": mask}


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return what each strength costs and saves, by model and cache."""
    header = ["model", "slots", "strength", "perplexity", "change", "misses (%)", "change of misses"]
    header += ["loads a token", "agreement (%)"]
    cells, before = [], None
    for row in rows:
        size = row["bytes_per_token"]
        cells.append(
            [
                row["model"] if row["model"] != before else "",
                f"{row['slots']} ({row['cache_ratio']:g} x K)",
                f"{row['strength']:g}",
                number(2)(row["perplexity"]),
                change(row["perplexity_change"]),
                percent(row["misses"]),
                change(row["misses_change"]),
                in_bytes(None if math.isnan(size) else size),
                percent(row["agreement"]),
            ]
        )
        before = row["model"]
    method = rows[0]["method"]
    return Table(f"Cache-aware routing ({method})", header, cells, NOTE)


def bought(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a sentence for each model and cache: the fewest misses that at most +0.5% of perplexity buys.

    Example:
        >>> row = {"model": "olmoe", "slots": 16, "misses": 0.2, "misses_change": -0.4, "strength": 0.1}
        >>> bought([row | {"perplexity_change": 0.004}])
        ['olmoe, 16 slots: +0.5% perplexity buys -40.0% misses (strength 0.1, +0.4%).']
    """
    said = []
    for key in dict.fromkeys((row["model"], row["slots"]) for row in rows):
        mine = [row for row in rows if (row["model"], row["slots"]) == key and row["perplexity_change"] <= MOST_COST]
        best = min(mine, key=lambda row: row["misses"])
        where = f"{key[0]}, {key[1]} slots: +0.5% perplexity buys"
        found = f"{change(best['misses_change'])} misses (strength {best['strength']:g}, "
        found += f"{change(best['perplexity_change'])})."
        said.append(f"{where} {found}" if best["strength"] else f"{where} nothing: every strength costs more.")
    return said


def figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the change of perplexity against misses: a line for each model and cache, a point for each strength."""
    drawn, (axes,) = panels(1, 1, 7.0, 4.6)
    models = list(dict.fromkeys(row["model"] for row in rows))
    styles = ("-", "--", "-.", ":")
    sizes = list(dict.fromkeys(row["cache_ratio"] for row in rows))
    for model, ratio in dict.fromkeys((row["model"], row["cache_ratio"]) for row in rows):
        line = [row for row in rows if (row["model"], row["cache_ratio"]) == (model, ratio)]
        axes.plot(
            [row["misses"] for row in line],
            [row["perplexity_change"] for row in line],
            marker="o",
            color=COLOURS[models.index(model) % len(COLOURS)],
            linestyle=styles[sizes.index(ratio) % len(styles)],
            label=f"{model}, {ratio:g} x K slots",
        )
    axes.axhline(MOST_COST, color="0.5", linewidth=1, linestyle=":")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1))
    axes.set(xlabel="misses of an LRU cache", ylabel="change of perplexity", title="Cache-aware routing")
    axes.legend(frameon=False, fontsize=8)
    return drawn


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as CSV, the model first."""
    text = io.StringIO()
    columns = ["model", *(name for name in rows[0] if name != "model")]
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
