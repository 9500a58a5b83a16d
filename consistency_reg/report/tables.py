"""The tables of a report as text cells, for the terminal and for the page."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from consistency_reg.report.pairs import Pair, by_cell
from consistency_reg.report.runs import COLLAPSED_BELOW, MAX_MEAN, MIN_SHARE, Run

Column = tuple[str, Callable[[Run], float], Callable[[float], str]]


@dataclass(frozen=True)
class Table:
    """A title, a header, and a row of text for each run; ``note`` says what the marks mean."""

    title: str
    header: list[str]
    rows: list[list[str]] = field(default_factory=list)
    note: str = ""


def percent(value: float) -> str:
    """A share in percent: 0.4567 -> 45.7."""
    return "" if math.isnan(value) else f"{100 * value:.1f}"


def change(value: float) -> str:
    """A change in percent with its sign: -0.305 -> -30.5%."""
    return "" if math.isnan(value) else f"{100 * value:+.1f}%"


def points(value: float) -> str:
    """A difference of two shares in percentage points: 0.041 -> +4.1."""
    return "" if math.isnan(value) else f"{100 * value:+.1f}"


def number(digits: int) -> Callable[[float], str]:
    """Fixed digits: number(2)(1.234) -> 1.23."""
    return lambda value: "" if math.isnan(value) else f"{value:.{digits}f}"


def multiple(value: float) -> str:
    """A ratio: 1.064 -> 1.06x."""
    return "" if math.isnan(value) else f"{value:.2f}x"


def millions(value: float) -> str:
    """Parameters: 12345678 -> 12.35M."""
    return f"{value / 1e6:.2f}M"


def metric(name: str) -> Callable[[Run], float]:
    """Reads a metric, NaN where it was not measured."""
    return lambda run: run.metrics.get(name, math.nan)


def run_tables(runs: Sequence[Run]) -> list[Table]:
    """A row for each run, its columns spread over tables that a terminal can hold; none where nothing was measured."""
    domains = list(dict.fromkeys(domain for run in runs for domain in run.domains))
    tables = [
        _table(
            "Models",
            runs,
            [
                ("parameters", lambda run: run.total_parameters, millions),
                ("active", lambda run: run.active_parameters, millions),
                ("perplexity", metric("val/ppl"), number(2)),
                ("tokens/s", lambda run: run.tokens_per_s, number(0)),
                ("tokens", lambda run: run.tokens, millions),
                ("seconds", lambda run: run.wall_time_s, number(0)),
            ],
            leading=[("experts", lambda run: run.architecture), ("term", term), ("seed", lambda run: str(run.seed))],
        ),
        _table("Perplexity by domain", runs, [(name, metric(f"val/ppl/{name}"), number(2)) for name in domains]),
        _table(
            "Consistency (SRP, gain and overlap in %)",
            runs,
            [
                *((f"SRP m={m}", metric(f"val/srp/m{m}"), percent) for m in (4, 16, 64)),
                *((f"rho_hat m={m}", metric(f"val/rho_hat/m{m}"), number(2)) for m in (4, 16, 64)),
                ("static SRP", metric("val/static_srp"), percent),
                ("local gain m=16", metric("val/local_gain/m16"), percent),
                ("overlap", metric("val/overlap"), percent),
            ],
        ),
        _table(
            "Cache and balance (hit rates in %)",
            runs,
            [
                ("LRU hits at K", metric("val/cache/lru_k"), percent),
                ("at 2K", metric("val/cache/lru_2k"), percent),
                ("at 25% of experts", metric("val/cache/lru_25pct"), percent),
                ("global CV", metric("val/balance/cv"), number(3)),
                ("max/mean", metric(MAX_MEAN), number(2)),
                ("smallest share", metric(MIN_SHARE), number(2)),
                ("local CV m=16", metric("val/balance/local_cv/m16"), number(3)),
            ],
            note=f"smallest share: of the fair share; below {COLLAPSED_BELOW} a run counts as collapsed"
            if any(run.collapsed for run in runs)
            else "smallest share: of the fair share",
        ),
    ]
    return [table for table in tables if len(table.header) > 1]


def pair_table(pairs: Sequence[Pair]) -> Table:
    """A row for each pair, and for a cell of several seeds their mean, lowest and highest."""
    header = [
        "run",
        "against",
        "seed",
        "LRU misses at 25%",
        "perplexity",
        "SRP m=16",
        "local gain",
        "smallest share",
        "max/mean",
    ]
    table = Table(
        "Paired with its baseline",
        header,
        note="changes against the baseline of the same seed; SRP and gain in percentage points, max/mean as a multiple",
    )
    for group in by_cell(pairs).values():
        for pair in group:
            table.rows.append([run_name(pair.run), pair.baseline.name, str(pair.run.seed), *_pair_cells([pair], fmean)])
        if len(group) > 1:
            cell, mean = group[0].run.cell, f"mean of {len(group)}"
            for label, over_seeds in ((mean, fmean), ("lowest", min), ("highest", max)):
                table.rows.append([cell, "", label, *_pair_cells(group, over_seeds)])
    return table


def run_name(run: Run) -> str:
    """The run's name, with a mark when an expert collapsed."""
    return f"{run.name} (collapsed)" if run.collapsed else run.name


def term(run: Run) -> str:
    """The consistency term and its weight.

    For example "LocalConsistency 0.3"; "none" without one.
    """
    return f"{run.loss} {run.weight:g}" if run.weight else run.loss


def _pair_cells(pairs: Sequence[Pair], over_seeds: Callable[[list[float]], float]) -> list[str]:
    return [
        change(over_seeds([pair.misses_change for pair in pairs])),
        change(over_seeds([pair.perplexity_change for pair in pairs])),
        points(over_seeds([pair.srp_change for pair in pairs])),
        points(over_seeds([pair.local_gain_change for pair in pairs])),
        number(2)(over_seeds([pair.smallest_share for pair in pairs])),
        multiple(over_seeds([pair.max_mean_ratio for pair in pairs])),
    ]


def _table(
    title: str,
    runs: Sequence[Run],
    columns: Sequence[Column],
    *,
    leading: Sequence[tuple[str, Callable[[Run], str]]] = (),
    note: str = "",
) -> Table:
    """A table without the columns that no run has."""
    kept = [column for column in columns if not all(math.isnan(column[1](run)) for run in runs)]
    header = ["run", *(name for name, _ in leading), *(name for name, _, _ in kept)]
    rows = [
        [run_name(run), *(read(run) for _, read in leading), *(show(read(run)) for _, read, show in kept)]
        for run in runs
    ]
    return Table(title, header, rows, note)
