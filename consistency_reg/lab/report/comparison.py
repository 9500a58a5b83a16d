"""Show what was compared as tables: cells, losses, the gate, design choices, the published ablation, cost by tokens."""

import math
from collections.abc import Callable

from consistency_reg.lab.render.table import Table, change, millions, number, percent, points, spread
from consistency_reg.lab.render.verdict import CV_RATIO_AT_MOST
from consistency_reg.lab.report.effects import sign
from consistency_reg.lab.report.gate import GATE, LEAST_EXPERTS, LEAST_SEEDS, STUDY, Criterion, large_enough, passes
from consistency_reg.lab.report.hypervolume import BUDGETS, REFERENCE, Budget
from consistency_reg.lab.report.pairs import mean_and_range
from consistency_reg.measures import COLLAPSED_BELOW
from consistency_reg.optional import require

with require("plots"):
    import pandas as pd

OVER_SEEDS = "means over the seeds, in parentheses the lowest and the highest"
STUDY_TITLE = "30% fewer for +1%"
LEFT_OUT = (
    f"left out: runs with an expert below {COLLAPSED_BELOW} of its fair share or a global CV above "
    f"{CV_RATIO_AT_MOST} times the baseline's"
)


def cell_table(cells: pd.DataFrame) -> Table:
    """Return a row for each cell of :func:`~consistency_reg.lab.report.cells.cell_frame`."""
    header = ["cell", "against", "term", "seeds", "LRU misses at 25%", "perplexity", "SRP m=16", "smallest share"]
    table = Table(
        "Frontier",
        [*header, "global CV over baseline's", "left out", "dominated by"],
        note=f"changes against the baseline of the same seed: {OVER_SEEDS}; SRP in percentage points; {LEFT_OUT}; "
        "dominated: another cell that stays has no more misses and no more perplexity, on average",
        gives_way=("against", "dominated by", "term", "seeds"),
    )
    for _, cell in cells.iterrows():
        table.rows.append(
            [
                _name(cell),
                cell["against"],
                _term(cell),
                str(cell["seeds"]),
                *(
                    shown_over_seeds(cell, name, show)
                    for name, show in (("misses_change", change), ("perplexity_change", change), ("srp_change", points))
                ),
                number(2)(cell["smallest_share_min"]),
                number(2)(cell["cv_ratio_max"]),
                str(cell["left_out"]) if cell["left_out"] else "",
                cell["dominated_by"],
            ]
        )
    return table


def loss_table(losses: pd.DataFrame) -> Table:
    """Return a row for each loss of :func:`~consistency_reg.lab.report.hypervolume.loss_frame`."""
    header = ["loss", "against", "weights", "seeds", "left out", "hypervolume (%)", "SD", "behind the first"]
    table = Table(
        "Losses over all their weights",
        [*header, *(f"fewest misses: {budget_name(budget)}" for budget in BUDGETS)],
        note="hypervolume: area between what the runs of a seed reach and the point of "
        f"{100 * REFERENCE[0]:+g}% perplexity and {100 * REFERENCE[1]:g}% fewer LRU misses, in percent of the box up "
        f"to 0% perplexity and no misses at all; {OVER_SEEDS}, SD over seeds; behind: the first loss less this one, "
        f"seed by seed; fewest misses: change of the best cell's mean within a budget of perplexity; {LEFT_OUT}",
        gives_way=("SD", "against", "behind the first", "seeds", "left out"),
    )
    for _, loss in losses.iterrows():
        table.rows.append(
            [
                loss["loss"],
                loss["against"],
                ", ".join(f"{weight:g}" for weight in loss["weights"]),
                str(len(loss["seeds"])),
                f"{loss['left_out']} of {loss['runs']}" if loss["left_out"] else "",
                shown_over_seeds(loss, "volume", percent),
                percent(loss["volume_std"]),
                shown_over_seeds(loss, "behind", percent) if loss["behind_max"] or loss["behind_min"] else "",
                *(best_of(loss[f"best {i}"]) for i in range(len(BUDGETS))),
            ]
        )
    return table


def gate_table(cells: pd.DataFrame) -> Table:
    """Return each cell against the gate, the cells that pass first, then those with the fewest misses."""
    table = Table(
        "Gate",
        ["cell", "seeds", *(_bound(criterion) for criterion in GATE), "gate", STUDY_TITLE],
        note=f"in parentheses by how much a bound is met, or missed (!); the gate also asks for {LEAST_SEEDS} seeds "
        f"and {LEAST_EXPERTS} routed experts; the last column is the bar of arXiv 2608.18261, on averages",
        gives_way=(STUDY_TITLE, "seeds"),
    )
    rows = []
    for _, cell in cells.iterrows():
        passed = passes(cell, GATE) and large_enough(cell)
        verdict = "pass" if passed else "too small" if passes(cell, GATE) else "fail"
        shown = [_margin(criterion, cell[criterion.column]) for criterion in GATE]
        study = "pass" if passes(cell, STUDY) and not cell["left_out"] else "fail"
        row = [_name(cell), str(cell["seeds"]), *shown, verdict, study]
        misses = cell["misses_change_mean"]
        rows.append((not passed, bool(cell["left_out"]), math.inf if math.isnan(misses) else misses, row))
    table.rows.extend(row for *_, row in sorted(rows, key=lambda row: row[:3]))
    return table


def effect_table(effects: pd.DataFrame) -> Table:
    """Return a row for each value of :func:`~consistency_reg.lab.report.effects.effect_frame`."""
    table = Table(
        "Design choices at equal budget",
        [
            "choice",
            "instead of",
            "among",
            "seeds",
            "active",
            "LRU misses at 25%",
            "perplexity",
            "SRP m=16",
            "balance SD",
        ],
        note="differences to the run that differs in this choice alone, of the same seed and as many tokens: "
        f"{OVER_SEEDS}; SRP and SD in percentage points; ±: the seeds do not agree on the sign",
        gives_way=("active", "seeds", "SRP m=16"),
    )
    columns = (("misses", change), ("perplexity", change), ("srp", points), ("sd", lambda value: points(value / 100)))
    for _, effect in effects.iterrows():
        shown = []
        for name, show in columns:
            agreed = sign(effect[f"{name}_min"], effect[f"{name}_max"]) != "±" or math.isnan(effect[f"{name}_mean"])
            shown.append(("" if agreed else "± ") + shown_over_seeds(effect, name, show))
        table.rows.append(
            [
                f"{effect['choice']}={effect['value']}",
                effect["reference"],
                effect["among"],
                str(effect["seeds"]),
                millions(effect["active_parameters"]),
                *shown,
            ]
        )
    return table


def published_tables(beside: pd.DataFrame, agreed: pd.DataFrame) -> list[Table]:
    """Return our designs next to the published ones, and how far the two agree."""
    designs = Table(
        "The published designs",
        [
            "design",
            "term",
            "seeds",
            "SRP m=16",
            "published",
            "effect",
            "published effect",
            "sign",
            "SD",
            "published SD",
        ],
        note=f"in percent and percentage points; effect: against Baseline of the same seed and term, {OVER_SEEDS}; "
        "published: arXiv 2505.16056, models trained without a term",
    )
    for _, row in beside.iterrows():
        designs.rows.append(
            [
                row["design"],
                row["term"],
                str(row["seeds"]),
                number(1)(row["srp_mean"]),
                number(1)(row["srp"]),
                shown_over_seeds(row, "effect", lambda value: f"{value:+.1f}"),
                f"{row['effect']:+.1f}",
                "" if row["agrees"] is None else "same" if row["agrees"] else "other",
                number(2)(row["sd_mean"]),
                number(2)(row["sd"]),
            ]
        )
    summary = Table(
        "Agreement with the published designs",
        ["term", "effects with the published sign", "Spearman, SRP", "Spearman, balance SD"],
        [[row["term"], f"{row['signs']} of {row['effects']}", *_correlations(row)] for _, row in agreed.iterrows()],
        note="Spearman's rank correlation over the designs, of means over the seeds",
    )
    return [designs, summary]


def cost_table(costs: pd.DataFrame) -> Table:
    """Return what each cell of :func:`~consistency_reg.lab.report.cost.cost_frame` costs and saves by tokens seen."""
    marks = sorted(costs["tokens"].unique())
    table = Table(
        "Perplexity and LRU misses by tokens seen",
        ["cell", "against", *(f"{mark / 1e6:.3g}M" for mark in marks)],
        note="perplexity / misses: change against the same seed's baseline after as many tokens, means over seeds",
    )
    for (against, cell), group in costs.groupby(["against", "cell"], sort=False):
        means = group.groupby("tokens")[["perplexity_change", "misses_change"]].mean().reindex(marks)
        shown = [" / ".join(filter(None, map(change, row))) for row in means.itertuples(index=False)]
        table.rows.append([cell, against, *shown])
    return table


def _name(cell: pd.Series) -> str:
    return f"{cell['cell']} (left out)" if cell["left_out"] else str(cell["cell"])


def _term(cell: pd.Series) -> str:
    return f"{cell['loss']} {cell['weight']:g}"


def shown_over_seeds(row: pd.Series, name: str, show: Callable[[float], str]) -> str:
    """Return a change over the seeds as text."""
    return spread(show, *mean_and_range(row, name))


def budget_name(budget: Budget) -> str:
    if budget.mean == budget.each:
        return f"each seed at most {100 * budget.each:+g}%"
    return f"{100 * budget.mean:+g}% on average, each at most {100 * budget.each:+g}%"


def best_of(cell: pd.Series | None) -> str:
    return "none" if cell is None else f"{change(cell['misses_change_mean'])} ({cell['cell']})"


def _bound(criterion: Criterion) -> str:
    bound = f"{100 * criterion.bound:+g}%" if criterion.percent else f"{criterion.bound:g}"
    return f"{criterion.name} {'≤' if criterion.at_most else '≥'} {bound}"


def _margin(criterion: Criterion, value: float) -> str:
    margin = criterion.margin(value)
    if math.isnan(margin):
        return "not measured (!)"
    show = change if criterion.percent else number(2)
    by = f"{abs(100 * margin):.1f}" if criterion.percent else f"{abs(margin):.2f}"
    return f"{show(value)} ({by}{' !' if margin < 0 else ''})"


def _correlations(row: pd.Series) -> list[str]:
    return [number(2)(row["spearman_srp"]), number(2)(row["spearman_sd"])]
