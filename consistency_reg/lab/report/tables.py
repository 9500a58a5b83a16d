"""The tables of a report as text cells, for the terminal and for the page."""

import math
from collections.abc import Callable, Sequence
from statistics import fmean

from consistency_reg.lab.render.table import Table, change, millions, multiple, number, percent, points
from consistency_reg.lab.render.verdict import COLLAPSED_BELOW
from consistency_reg.lab.report.pairs import Pair
from consistency_reg.lab.report.runs import (
    GLOBAL_CV,
    LOCAL_CV,
    LOCAL_GAIN,
    MAX_MEAN,
    MIN_SHARE,
    MISSES_FROM,
    PERPLEXITY,
    SRP,
    Run,
)

Column = tuple[str, Callable[[Run], float], Callable[[float], str]]


def metric(name: str) -> Callable[[Run], float]:
    """Reads a metric, NaN where it was not measured."""
    return lambda run: run.get(name)


def overview_table(runs: Sequence[Run]) -> Table:
    """A row for each cell, over its seeds: what a reader asks first."""
    cells: dict[str, list[Run]] = {}
    for run in runs:
        cells.setdefault(run.cell, []).append(run)
    columns: list[tuple[str, str, Callable[[float], str], Callable[[list[float]], float]]] = [
        ("perplexity", PERPLEXITY, number(1), fmean),
        ("SRP m=16 (%)", SRP, percent, fmean),
        ("static SRP (%)", "val/static_srp", percent, fmean),
        ("LRU misses at 25% of the experts (%)", MISSES_FROM, lambda hits: percent(1 - hits), fmean),
        ("global CV", GLOBAL_CV, number(2), fmean),
        ("local CV m=16", LOCAL_CV, number(2), fmean),
        ("smallest share", MIN_SHARE, number(2), min),
    ]
    rows = [
        [
            f"{cell} (collapsed)" if any(run.collapsed for run in group) else cell,
            group[0].architecture,
            term(group[0]),
            str(len(group)),
            *(show(over([run.get(name) for run in group])) for _, name, show, over in columns),
        ]
        for cell, group in cells.items()
    ]
    note = "means over the seeds; smallest share: the least used expert of any seed, over its fair share"
    header = ["cell", "experts/active", "term", "seeds", *(column[0] for column in columns)]
    return Table("Overview", header, rows, note, gives_way=("local CV m=16", "experts/active", "seeds", "term"))


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
                ("perplexity", metric(PERPLEXITY), number(2)),
                ("tokens/s", lambda run: run.tokens_per_s, number(0)),
                ("tokens", lambda run: run.tokens, millions),
                ("seconds", lambda run: run.wall_time_s, number(0)),
            ],
            leading=[("experts", lambda run: run.architecture), ("term", term), ("seed", lambda run: str(run.seed))],
            gives_way=("seconds", "experts", "tokens", "parameters"),
        ),
        _table("Perplexity by domain", runs, [(name, metric(f"val/ppl/{name}"), number(2)) for name in domains]),
        _table(
            "Consistency (SRP, gain and overlap in %)",
            runs,
            [
                *((f"SRP m={m}", metric(f"val/srp/m{m}"), percent) for m in (4, 16, 64)),
                *((f"rho_hat m={m}", metric(f"val/rho_hat/m{m}"), number(2)) for m in (4, 16, 64)),
                ("static SRP", metric("val/static_srp"), percent),
                ("local gain m=16", metric(LOCAL_GAIN), percent),
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
                ("global CV", metric(GLOBAL_CV), number(3)),
                ("max/mean", metric(MAX_MEAN), number(2)),
                ("smallest share", metric(MIN_SHARE), number(2)),
                ("local CV m=16", metric(LOCAL_CV), number(3)),
            ],
            note=f"smallest share: of the fair share; below {COLLAPSED_BELOW} a run counts as collapsed"
            if any(run.collapsed for run in runs)
            else "smallest share: of the fair share",
        ),
    ]
    return [table for table in tables if len(table.header) > 1]


def pair_table(pairs: Sequence[Pair]) -> Table:
    """A row for each pair."""
    header = ["run", "against", "LRU misses at 25%", "perplexity", "SRP m=16", "local gain", "smallest share"]
    table = Table(
        "Paired with its baseline",
        [*header, "max/mean", "global CV"],
        note="changes against the baseline of the same seed; SRP and gain in percentage points, max/mean and CV as "
        "multiples",
        gives_way=("max/mean", "local gain", "against"),
    )
    for pair in pairs:
        table.rows.append(
            [
                run_name(pair.run),
                pair.baseline.name,
                change(pair.misses_change),
                change(pair.perplexity_change),
                points(pair.srp_change),
                points(pair.local_gain_change),
                number(2)(pair.smallest_share),
                multiple(pair.max_mean_ratio),
                multiple(pair.cv_ratio),
            ]
        )
    return table


def origin_tables(runs: Sequence[Run]) -> list[Table]:
    """How each run was made, and the hashes of the text."""
    made = [
        [
            run.name,
            run.command,
            run.git_commit,
            ", ".join(f"{name} {version}" for name, version in run.versions.items()),
            run.device,
        ]
        for run in runs
    ]
    text = [[domain, str(sha256)] for domain, sha256 in runs[0].data.get("corpus", {}).items()]
    return [
        Table("How the runs were made", ["run", "command", "commit", "versions", "device"], made),
        Table("Text", ["domain", "SHA-256, its first digits"], text),
    ]


def run_name(run: Run) -> str:
    """The run's name, with a mark when an expert collapsed."""
    return f"{run.name} (collapsed)" if run.collapsed else run.name


def term(run: Run) -> str:
    """The consistency term and its weight.

    For example "LocalConsistency 0.3"; "none" without one.
    """
    return f"{run.loss} {run.weight:g}" if run.weight else run.loss


def _table(
    title: str,
    runs: Sequence[Run],
    columns: Sequence[Column],
    *,
    leading: Sequence[tuple[str, Callable[[Run], str]]] = (),
    note: str = "",
    gives_way: tuple[str, ...] = (),
) -> Table:
    """A table without the columns that no run has."""
    kept = [column for column in columns if not all(math.isnan(column[1](run)) for run in runs)]
    header = ["run", *(name for name, _ in leading), *(name for name, _, _ in kept)]
    rows = [
        [run_name(run), *(read(run) for _, read in leading), *(show(read(run)) for _, read, show in kept)]
        for run in runs
    ]
    return Table(title, header, rows, note, gives_way)
