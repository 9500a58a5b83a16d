"""Tables of runs as they are deployed: which saves most, what training and the bias each do, and every strength."""

import math

from consistency_reg.lab.render.table import Table, change, number, percent
from consistency_reg.lab.report.comparison import LEFT_OUT, OVER_SEEDS, budget_name, shown_over_seeds
from consistency_reg.lab.report.hypervolume import BUDGETS, REFERENCE
from consistency_reg.optional import require

with require("plots"):
    import pandas as pd

AGAINST = "changes against the baseline of the same seed without any bias"
LEFT_OUT_DEPLOYED = LEFT_OUT.replace("runs with", "points with")


def deployed_tables(ranks: pd.DataFrame, parts: pd.DataFrame) -> list[Table]:
    """Return what each cell reaches as it is deployed, and where trained cells have a baseline with the bias, why.

    Args:
        ranks: of :func:`~consistency_reg.lab.report.deployed.rank_frame`.
        parts: of :func:`~consistency_reg.lab.report.deployed.parts_frame`.
    """
    return [rank_table(ranks), *([] if parts.empty else [parts_table(parts)])]


def rank_table(ranks: pd.DataFrame) -> Table:
    """Return a row for each cell: its hypervolume over all strengths, and the fewest misses within each budget."""
    columns = ["hypervolume (%)", "behind the first", *(f"fewest misses: {budget_name(budget)}" for budget in BUDGETS)]
    missing = "" if ranks["has_baseline"].all() else "baseline missing: against the run itself without any bias; "
    table = Table(
        "As deployed: misses within a budget",
        ["cell", "cache", "trained", "seeds", *columns, "left out"],
        note=f"cache-aware routing at every strength that was measured; {AGAINST}; not trained: the bias of the router "
        f"is all there is; {missing}hypervolume: area up to {100 * REFERENCE[0]:+g}% perplexity, in percent of the "
        f"box; {OVER_SEEDS}; in parentheses after fewest misses the strength; {LEFT_OUT_DEPLOYED}",
        gives_way=("behind the first", "seeds", "left out", "cache"),
    )
    for _, row in ranks.iterrows():
        table.rows.append(
            [
                row["cell"],
                row["deployed"],
                _trained(row),
                str(len(row["seeds"])),
                shown_over_seeds(row, "volume", percent),
                shown_over_seeds(row, "behind", percent) if row["behind_max"] or row["behind_min"] else "",
                *(_best(row[f"best {i}"]) for i in range(len(BUDGETS))),
                f"{row['left_out']} of {row['runs']}" if row["left_out"] else "",
            ]
        )
    return _without_empty(table)


def parts_table(parts: pd.DataFrame) -> Table:
    """Return a row for each trained cell: what training, the bias, and both do to misses and perplexity."""
    table = Table(
        "As deployed: what training and the bias do",
        ["cell", "cache", "strength", "training alone", "bias alone", "both", "bias adds", "bias alone, as few misses"],
        note=f"misses / perplexity, {AGAINST}, means over the seeds, at the strength with the fewest misses for "
        f"{budget_name(BUDGETS[0])}; bias adds: its cost in perplexity to the trained model; the last column: what the "
        "bias alone costs for as few misses, between the strengths that were measured",
        gives_way=("cache",),
    )
    for _, row in parts.iterrows():
        alone = f"more than {change(row['alone_at_most'])}" if math.isnan(row["alone"]) else change(row["alone"])
        both = (_pair(row, name) for name in ("training", "bias", "both"))
        table.rows.append([row["cell"], row["deployed"], f"{row['strength']:g}", *both, change(row["added"]), alone])
    return _without_empty(table)


def strength_table(strengths: pd.DataFrame) -> Table:
    """Return a row for each cell and strength of :func:`~consistency_reg.lab.report.deployed.strength_frame`."""
    shown = {
        "LRU misses": ("misses_change", change),
        "perplexity": ("perplexity_change", change),
        "LFU misses": ("lfu_change", change),
    }
    table = Table(
        "As deployed: every strength",
        ["cell", "cache", "strength", "seeds", *shown, "smallest share", "global CV over baseline's", "agreement (%)"],
        note=f"{AGAINST}: {OVER_SEEDS}; agreement: share of the experts that the model would have chosen itself; "
        f"{LEFT_OUT_DEPLOYED}",
        gives_way=("LFU misses", "agreement (%)", "cache", "seeds"),
    )
    for _, row in strengths.iterrows():
        table.rows.append(
            [
                f"{row['cell']} (left out)" if row["left_out"] else row["cell"],
                row["deployed"],
                f"{row['strength']:g}",
                str(row["seeds"]),
                *(shown_over_seeds(row, name, show) for name, show in shown.values()),
                number(2)(row["smallest_share_min"]),
                number(2)(row["cv_ratio_max"]),
                percent(row["agreement_mean"]),
            ]
        )
    return _without_empty(table)


def _trained(row: pd.Series) -> str:
    if row["loss"] == "none":
        return "no"
    return "yes" if row["has_baseline"] else "yes, baseline missing"


def _best(row: pd.Series | None) -> str:
    return "none" if row is None else f"{change(row['misses_change_mean'])} ({row['strength']:g})"


def _pair(row: pd.Series, name: str) -> str:
    both = [change(row[f"{name}_misses"]), change(row[f"{name}_perplexity"])]
    return " / ".join(both) if all(both) else ""


def _without_empty(table: Table) -> Table:
    """Return the table without the columns that say nothing: one cache for all rows, and nothing that was measured."""
    place = table.header.index("cache")
    caches = {row[place] for row in table.rows}
    empty = [i for i in range(len(table.header)) if all(row[i] == "" for row in table.rows)]
    dropped = {*empty, *([place] if len(caches) == 1 else [])}
    kept = [i for i in range(len(table.header)) if i not in dropped]
    note = f"a cache of {caches.pop()} a layer; {table.note}" if len(caches) == 1 else table.note
    rows = [[row[i] for i in kept] for row in table.rows]
    return Table(table.title, [table.header[i] for i in kept], rows, note, table.gives_way)
