"""What fine-tuning changed: each fine-tuned run before and after, as a table."""

import math
from collections.abc import Callable, Sequence

from consistency_reg.lab.render.table import Table, number, percent
from consistency_reg.lab.report.runs import Run
from consistency_reg.lab.report.tables import run_name

BEFORE = "val/before/"


def misses(hits: float) -> str:
    """A hit rate as misses in percent: 0.7 -> 30.0."""
    return percent(1 - hits)


COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("perplexity", "ppl", number(2)),
    ("LRU misses at K", "cache/lru_k", misses),
    ("at 2K", "cache/lru_2k", misses),
    ("at 25% of experts", "cache/lru_25pct", misses),
    ("SCH misses at 2K", "cache/sch_m16_2k", misses),
    ("SRP m=16", "srp/m16", percent),
    ("global CV", "balance/cv", number(2)),
    ("local CV m=16", "balance/local_cv/m16", number(2)),
    ("smallest share", "balance/min_share", number(2)),
)


def fine_tuning_tables(runs: Sequence[Run]) -> list[Table]:
    """One table with a row for each run that began with a checkpoint; none where no run did.

    A run with a consistency term says so when its control, fine-tuned without the term and with all else equal, is not
    among the runs: what fine-tuning alone changes is not the term's doing.
    """
    tuned = [run for run in runs if f"{BEFORE}ppl" in run.metrics]
    if not tuned:
        return []
    controls = {run.pair for run in tuned if run.loss == "none"}
    rows = []
    for run in tuned:
        cells = [_before_and_after(run, name, show) for _, name, show in COLUMNS]
        agreement = percent(run.metrics.get("val/agreement", math.nan))
        control = "is the control" if run.loss == "none" else "shown" if run.pair in controls else "missing"
        rows.append([run_name(run), control, *cells, agreement])
    note = (
        "before -> after, on the same text; misses, SRP and agreement in %; agreement: experts that the checkpoint "
        "chose for the same token too. What the control changes is fine-tuning's doing, not the term's"
    )
    if any(row[1] == "missing" for row in rows):
        note += "; control missing: fine-tune the same checkpoint with --consistency.weight 0 and report on both"
    header = ["run", "control", *(header for header, _, _ in COLUMNS), "agreement"]
    return [Table("Before and after fine-tuning", header, rows, note)]


def _before_and_after(run: Run, name: str, show: Callable[[float], str]) -> str:
    before, after = (show(run.metrics.get(f"{prefix}{name}", math.nan)) for prefix in (BEFORE, "val/"))
    return f"{before} -> {after}" if before and after else after
