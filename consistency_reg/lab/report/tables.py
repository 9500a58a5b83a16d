"""Make the tables of a report about its runs: overview, measures of each run, pairs, and how the runs were made."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from consistency_reg.lab.recipe import IN_THE_LOOP
from consistency_reg.lab.render.table import Table, millions, number
from consistency_reg.lab.report.measured import GLOBAL_CV, HITS, LOCAL_GAIN, MAX_MEAN, MIN_SHARE, PERPLEXITY, SRP
from consistency_reg.lab.report.pairs import Pair
from consistency_reg.lab.report.runs import Run
from consistency_reg.measures import COLLAPSED_BELOW, shown_in
from consistency_reg.measures.reading import VALIDATION, Reading

ASKED_FIRST = (HITS, PERPLEXITY, SRP, LOCAL_GAIN, MIN_SHARE, MAX_MEAN, GLOBAL_CV)  # the order of changes in a pair


@dataclass(frozen=True)
class Column:
    """Holds a column of a table of runs: its name, what it reads of a run, and how that becomes text."""

    name: str
    read: Callable[[Run], float]
    show: Callable[[float], str]


def overview_table(runs: Sequence[Run]) -> Table:
    """Return a row for each cell, over its seeds: what a reader asks first."""
    cells: dict[str, list[Run]] = {}
    for run in runs:
        cells.setdefault(run.cell, []).append(run)
    shown = [(measure_column(reading), reading.measure.over_layers) for reading in shown_in("overview")]
    rows = [
        [
            f"{cell} (collapsed)" if any(run.collapsed for run in group) else cell,
            group[0].architecture,
            term(group[0]),
            str(len(group)),
            *(column.show((min if worst == "min" else fmean)(map(column.read, group))) for column, worst in shown),
        ]
        for cell, group in cells.items()
    ]
    note = "means over the seeds; smallest share: the least used expert of any seed, over its fair share"
    header = ["cell", "experts/active", "term", "seeds", *(column.name for column, _ in shown)]
    return Table("Overview", header, rows, note, gives_way=("local CV m=16", "experts/active", "seeds", "term"))


def run_tables(runs: Sequence[Run]) -> list[Table]:
    """Return tables with a row for each run: sizes and speed, perplexity by domain, and the measures of each kind."""
    domains = list(dict.fromkeys(domain for run in runs for domain in run.domains))
    consistency, caches, balance = (
        [measure_column(reading, finer) for reading in shown_in("runs", panel)]
        for panel, finer in (("Consistency", 0), ("Caches", 0), ("Balance", 1))
    )
    collapsed = f"; below {COLLAPSED_BELOW} a run counts as collapsed" if any(run.collapsed for run in runs) else ""
    tables = [
        _table(
            "Models",
            runs,
            [
                Column("parameters", lambda run: run.total_parameters, millions),
                Column("active", lambda run: run.active_parameters, millions),
                measure_column(PERPLEXITY, 1),
                Column("tokens/s", lambda run: run.tokens_per_s, number(0)),
                Column("tokens", lambda run: run.tokens, millions),
                Column("seconds", lambda run: run.wall_time_s, number(0)),
            ],
            leading=[("experts", lambda run: run.architecture), ("term", term), ("seed", lambda run: str(run.seed))],
            gives_way=("seconds", "experts", "tokens", "parameters"),
        ),
        _table(
            "Perplexity by domain",
            runs,
            [measure_column(PERPLEXITY.within(VALIDATION, domain=domain), 1, domain) for domain in domains],
        ),
        _table(
            "Consistency and balance",
            runs,
            [*consistency, *balance],
            note=f"smallest share: of the fair share{collapsed}; without local gain a high SRP is imbalance",
            gives_way=tuple(column.name for column in consistency if "rho_hat" in column.name),
        ),
        _table("Cache misses", runs, caches),
    ]
    return [table for table in tables if len(table.header) > 1]


def measure_column(reading: Reading, finer: int = 0, name: str = "") -> Column:
    """Return the column of a measure: hit rates are shown as misses, shares in percent.

    Args:
        reading: of the table of measures; of the validation unless it says otherwise.
        finer: more digits than the measure usually has.
        name: of the column; that of the measure and its unit when empty.
    """
    logged = reading if reading.stage else reading.within(VALIDATION)
    label = name or (reading.complement or reading.label) + reading.measure.unit_label

    def read(run: Run) -> float:
        value = run.get(logged)
        return 1 - value if reading.complement else value

    return Column(label, read, lambda value: reading.show(value, finer))


def pair_table(pairs: Sequence[Pair]) -> Table:
    """Return a row for each pair: how the run stands next to its baseline in each measure."""
    shown = sorted(
        (reading.within(VALIDATION) for reading in shown_in("pairs")),
        key=lambda reading: ASKED_FIRST.index(reading) if reading in ASKED_FIRST else len(ASKED_FIRST),
    )
    rows = [
        [run_name(pair.run), pair.baseline.name, *(reading.show_compared(pair.compared(reading)) for reading in shown)]
        for pair in pairs
    ]
    return Table(
        "Paired with its baseline",
        ["run", "against", *(reading.complement or reading.label for reading in shown)],
        rows,
        note="changes against the baseline of the same seed; SRP and gain in percentage points, max/mean and CV as "
        "multiples",
        gives_way=("max/mean", "local gain m=16", "against"),
    )


def origin_tables(runs: Sequence[Run]) -> list[Table]:
    """Return how each run was made, and the hashes of the text."""
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
    """Return the run's name, with a mark when an expert collapsed."""
    return f"{run.name} (collapsed)" if run.collapsed else run.name


def term(run: Run) -> str:
    """Return the consistency term and its weight, such as "LocalConsistency 0.3, loop 0.1"; "none" without one."""
    named = f"{run.loss} {run.weight:g}" if run.weight else run.loss
    return f"{named}, loop {run.loop:g}" if run.loop and run.loss != IN_THE_LOOP else named


def _table(
    title: str,
    runs: Sequence[Run],
    columns: Sequence[Column],
    *,
    leading: Sequence[tuple[str, Callable[[Run], str]]] = (),
    note: str = "",
    gives_way: tuple[str, ...] = (),
) -> Table:
    """Return a table without the columns that no run has."""
    kept = [column for column in columns if not all(math.isnan(column.read(run)) for run in runs)]
    header = ["run", *(name for name, _ in leading), *(column.name for column in kept)]
    rows = [
        [run_name(run), *(read(run) for _, read in leading), *(column.show(column.read(run)) for column in kept)]
        for run in runs
    ]
    return Table(title, header, rows, note, gives_way)
