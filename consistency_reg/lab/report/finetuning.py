"""Show what fine-tuning changed: each fine-tuned run before and after, as a table."""

from collections.abc import Sequence

from consistency_reg.lab.render.table import Table
from consistency_reg.lab.report.measured import GLOBAL_CV, HITS, LOCAL_CV, MIN_SHARE, PERPLEXITY, SRP, before
from consistency_reg.lab.report.runs import Run
from consistency_reg.lab.report.tables import measure_column, run_name
from consistency_reg.measures import AGREEMENT, HIT_RATE
from consistency_reg.measures.reading import VALIDATION, Reading

SHOWN: tuple[Reading, ...] = (
    PERPLEXITY,
    HIT_RATE.at(ratio=1).within(VALIDATION),
    HIT_RATE.at(ratio=2).within(VALIDATION),
    HITS,
    HIT_RATE.at(cache="sch_m16", ratio=2).within(VALIDATION),
    SRP,
    GLOBAL_CV,
    LOCAL_CV,
    MIN_SHARE,
)


def fine_tuning_tables(runs: Sequence[Run]) -> list[Table]:
    """Return one table with a row for each run that began with a checkpoint; none where no run did.

    A run with a consistency term says so when its control, fine-tuned without the term and with all else equal, is not
    among the runs: what fine-tuning alone changes is not the term's doing.
    """
    tuned = [run for run in runs if run.measured(before(PERPLEXITY))]
    if not tuned:
        return []
    controls = {run.pair for run in tuned if run.loss == "none"}
    rows = []
    for run in tuned:
        cells = [_before_and_after(run, reading) for reading in SHOWN]
        agreement = AGREEMENT.show(run.get(AGREEMENT.at().within(VALIDATION)))
        control = "is the control" if run.loss == "none" else "shown" if run.pair in controls else "missing"
        rows.append([run_name(run), control, *cells, agreement])
    note = (
        "before -> after, on the same text; agreement: experts that the checkpoint "
        "chose for the same token too. What the control changes is fine-tuning's doing, not the term's"
    )
    if any(row[1] == "missing" for row in rows):
        note += "; control missing: fine-tune the same checkpoint with --consistency.weight 0 and report on both"
    header = ["run", "control", *(measure_column(reading).name for reading in SHOWN), "agreement (%)"]
    return [Table("Before and after fine-tuning", header, rows, note)]


def _before_and_after(run: Run, reading: Reading) -> str:
    columns = (measure_column(one, finer=int(reading is PERPLEXITY)) for one in (before(reading), reading))
    earlier, later = (column.show(column.read(run)) for column in columns)
    return f"{earlier} -> {later}" if earlier and later else later
