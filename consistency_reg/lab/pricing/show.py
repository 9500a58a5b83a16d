"""Show what cache-aware routing costs and saves: a table, a picture and a sentence for each model."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from consistency_reg.lab.render.palette import COLOURS
from consistency_reg.lab.render.png import panels
from consistency_reg.lab.render.table import Table, change, in_bytes, number, percent
from consistency_reg.measures import COLLAPSED_BELOW
from consistency_reg.optional import require

with require("plots"):
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

MOST_COST = 0.005  # of perplexity, relative
MIN_SHARE = "balance/min_share"
NOTE = (
    "changes against the model as it is; misses of an LRU cache for each layer, as in the hit rates; loads count first "
    "uses too; agreement: share of the experts that the model would have chosen itself"
)


def name_of(row: Mapping[str, Any]) -> str:
    """Return the name of the model or run that a row is of, with the text where that is not its own."""
    name = str(row.get("model") or row["run"])
    return f"{name} on {row['domains']}" if row.get("domains") else name


def is_alive(row: Mapping[str, Any]) -> bool:
    """Return whether no expert is used less than a tenth of its fair share, as far as that was measured."""
    return not row.get(MIN_SHARE, math.nan) < COLLAPSED_BELOW


def price_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return what each strength costs and saves, by model and cache.

    Args:
        rows: rows of :func:`~consistency_reg.lab.pricing.rows.with_changes`, at least one.
    """
    header = ["model", "cache", "strength", "perplexity", "change", "misses (%)", "change of misses"]
    header += ["smallest share", "loads a token", "agreement (%)"]
    cells, before = [], None
    for row in rows:
        name, size = name_of(row), row.get("bytes_per_token", math.nan)
        cells.append(
            [
                name if name != before else "",
                _cache(row),
                _strength(row, rows),
                number(2)(row["perplexity"]),
                change(row["perplexity_change"]),
                percent(row["misses"]),
                change(row["misses_change"]),
                number(2)(row.get(MIN_SHARE, math.nan)),
                in_bytes(None if math.isnan(size) else size),
                percent(row.get("agreement", math.nan)),
            ]
        )
        before = name
    methods = dict.fromkeys(str(row["method"]) for row in rows)
    gives_way = ("loads a token", "agreement (%)", "cache")
    return Table(f"Cache-aware routing ({', '.join(methods)})", header, cells, NOTE, gives_way)


def _cache(row: Mapping[str, Any]) -> str:
    return f"{row['slots']:g} slots ({row['cache_ratio']:g} x K)" if row.get("slots") else f"{row['cache_ratio']:g} x K"


def _strength(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the strength of a row, with method and guarantee where other rows have others."""
    usual: dict[str, Any] = {"method": "prior", "guaranteed": 1}
    biased = [usual | dict(other) for other in rows if other["strength"]]
    methods, guarantees = ({other[name] for other in biased} for name in usual)
    said, mine = [f"{row['strength']:g}"], usual | dict(row)
    if row["strength"] and len(methods) > 1:
        said.append(mine["method"])
    if row["strength"] and len(guarantees) > 1:
        said.append(f"{mine['guaranteed']} guaranteed")
    return ", ".join(said)


def bought(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a sentence for each model and cache: the fewest misses that at most +0.5% of perplexity buys.

    A strength at which an expert is used less than a tenth of its fair share does not count, unless one is without the
    bias too.

    Example:
        >>> row = {"model": "olmoe", "slots": 16, "misses": 0.2, "misses_change": -0.4, "strength": 0.1}
        >>> bought([row | {"perplexity_change": 0.004}])
        ['olmoe, 16 slots: +0.5% perplexity buys -40.0% misses (strength 0.1, +0.4%).']
    """
    said = []
    for key in dict.fromkeys((name_of(row), row["slots"]) for row in rows):
        mine = [row for row in rows if (name_of(row), row["slots"]) == key]
        as_it_is_alive = all(is_alive(row) for row in mine if not row["strength"])
        cheap = [row for row in mine if row["perplexity_change"] <= MOST_COST and (is_alive(row) or not as_it_is_alive)]
        best = min(cheap, key=lambda row: (row["misses"], row["strength"]), default=None)
        found = "nothing: every strength costs more, or lets an expert fall below a tenth of its fair share."
        if best is not None and best["strength"]:
            how = f"strength {_strength(best, rows)}, {change(best['perplexity_change'])}"
            found = f"{change(best['misses_change'])} misses ({how})."
        elif any(row["strength"] for row in cheap):
            found = "nothing: no strength that costs as little has fewer misses."
        said.append(f"{key[0]}, {key[1]} slots: +0.5% perplexity buys {found}")
    return said


def figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the change of perplexity against misses: a line for each model and cache, a point for each strength."""
    drawn, (axes,) = panels(1, 1, 7.0, 4.6)
    models = list(dict.fromkeys(name_of(row) for row in rows))
    styles = ("-", "--", "-.", ":")
    sizes = list(dict.fromkeys(row["cache_ratio"] for row in rows))
    for model, ratio in dict.fromkeys((name_of(row), row["cache_ratio"]) for row in rows):
        line = [row for row in rows if (name_of(row), row["cache_ratio"]) == (model, ratio)]
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
