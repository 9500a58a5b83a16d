"""Make the page of a report, and the details that a click on a run or a cell opens."""

from collections.abc import Sequence
from statistics import fmean

from consistency_reg import measures
from consistency_reg.lab.render.page import CELL, RUN, Item, Page, html
from consistency_reg.lab.render.table import Table, change, spread
from consistency_reg.lab.render.verdict import Verdict
from consistency_reg.lab.report.figures import explored
from consistency_reg.lab.report.findings import Findings
from consistency_reg.lab.report.looks import Looks
from consistency_reg.lab.report.measured import HITS, PERPLEXITY
from consistency_reg.lab.report.pairs import Pair, mean_and_range
from consistency_reg.lab.report.runs import Run
from consistency_reg.lab.report.tables import measure_column, origin_tables, term
from consistency_reg.measures.reading import DEPLOYED, VALIDATION, Reading

MOST_NAMED = 3  # losses in a title


def page(source: str, findings: Findings, tables: Sequence[Table], verdict: Verdict) -> str:
    """Return the page of a report as one file that needs nothing beside itself.

    Args:
        source: what the runs were read from.
        findings: what a report says of them.
        tables: of the findings.
        verdict: on the findings.
    """
    looks = Looks.of(findings.runs, findings.pairs)
    return html(
        Page(
            title=title(source, findings.runs),
            about=about(findings.runs),
            verdict=verdict,
            tables=tables,
            figures=explored(findings),
            legend=looks.entries(findings.runs),
            origin=origin_tables(findings.runs),
            items=items(findings, looks),
        )
    )


def title(source: str, runs: Sequence[Run]) -> str:
    """Return what a report compares, such as "demo: LocalConsistency against no term"."""
    losses = sorted({run.loss for run in runs if run.loss != "none"})
    named = ", ".join(losses) if len(losses) <= MOST_NAMED else f"{len(losses)} consistency terms"
    without = any(run.loss == "none" for run in runs)
    compared = f"{named} against no term" if losses and without else named or "models without a consistency term"
    return f"{source}: {compared}"


def about(runs: Sequence[Run]) -> str:
    """Return the extent of a report: cells, runs, seeds, experts, tokens and domains."""
    seeds, tokens = {run.seed for run in runs}, sorted({run.tokens for run in runs})
    counts = {"cell": len({run.cell for run in runs}), "run": len(runs), "seed": len(seeds)}
    said = [f"{count} {what}{'s' if count > 1 else ''}" for what, count in counts.items()]
    experts = list(dict.fromkeys(run.architecture for run in runs))
    said.append(f"experts {', '.join(experts[:MOST_NAMED])}{' and others' if len(experts) > MOST_NAMED else ''}")
    ends = [f"{count / 1e6:.3g}M" for count in (tokens[0], tokens[-1])]
    said.append(f"{' to '.join(dict.fromkeys(ends))} tokens each")
    if domains := runs[0].domains:
        said.append(f"{len(domains)} domains of text")
    return " · ".join(said)


def items(findings: Findings, looks: Looks) -> dict[str, Item]:
    """Return what a click opens: every run, and every cell with its runs."""
    pairs = {pair.run.name: pair for pair in findings.pairs}
    cells: dict[str, list[Run]] = {}
    for run in findings.runs:
        cells.setdefault(run.cell, []).append(run)
    opened = {f"{RUN}{run.name}": _run_item(run, pairs.get(run.name), looks) for run in findings.runs}
    rows = {row["cell"]: row for _, row in findings.cells.iterrows()} if findings.pairs else {}
    for cell, runs in cells.items():
        row = rows.get(cell)
        facts = [("term", term(runs[0])), ("seeds", ", ".join(str(run.seed) for run in runs))]
        if row is not None:
            shown = {"LRU misses at 25%": "misses_change", "perplexity": "perplexity_change"}
            facts += [(f"{label}, change", spread(change, *mean_and_range(row, name))) for label, name in shown.items()]
            facts += [("against", row["against"]), ("dominated by", row["dominated_by"] or "no other cell")]
            facts += [("left out", f"{row['left_out']} of {row['seeds']} runs")] if row["left_out"] else []
        facts += _deployed(findings, cell)
        opened[f"{CELL}{cell}"] = Item(
            name=cell,
            cell=cell,
            group=looks.loss_of[runs[0].name],
            facts=[*facts, ("experts/active", runs[0].architecture)],
            measures=_measures(runs),
            header=("measure", "mean over the seeds"),
            members=[f"{RUN}{run.name}" for run in runs],
            members_title="Runs",
        )
    return opened


def _deployed(findings: Findings, cell: str) -> list[tuple[str, str]]:
    """Return what a cell costs and saves at each strength of cache-aware routing, by the setting."""
    if findings.deployed.empty:
        return []
    mine = findings.strengths[findings.strengths["cell"] == cell]
    return [
        (
            f"as deployed, {row['deployed']}, strength {row['strength']:g}",
            f"{change(row['misses_change_mean'])} misses for {change(row['perplexity_change_mean'])} perplexity",
        )
        for _, row in mine.iterrows()
        if row["strength"]
    ]


def _run_item(run: Run, pair: Pair | None, looks: Looks) -> Item:
    facts = [("cell", run.cell), ("seed", str(run.seed)), ("term", term(run))]
    if pair is not None:
        facts += [("LRU misses at 25%, change", change(pair.compared(HITS)))]
        facts += [("perplexity, change", change(pair.compared(PERPLEXITY)))]
    facts += [(f"option {name}", str(value)) for name, value in run.options.items()]
    facts += [(axis, label) for axis, label in run.labels.items()]
    facts += [
        ("experts/active", run.architecture),
        ("parameters", f"{run.total_parameters:,}, {run.active_parameters:,} active"),
        ("trained", f"{run.tokens:,} tokens in {run.steps:,} steps, {run.tokens_per_s:,.0f} tokens/s"),
        ("device", run.device or "unknown"),
        ("commit", run.git_commit or "unknown"),
        ("command", run.command),
        ("wandb", run.wandb_dir),
    ]
    both = [run] if pair is None else [run, pair.baseline]
    return Item(
        name=run.name,
        cell=run.cell,
        group=looks.loss_of[run.name],
        facts=[(name, text) for name, text in facts if text],
        measures=_measures([run], *([pair.baseline],) if pair else ()),
        header=("measure", "value", "baseline")[: 1 + len(both)],
        members=[f"{RUN}{pair.baseline.name}", f"{CELL}{run.cell}"] if pair else [f"{CELL}{run.cell}"],
        members_title="Its baseline and its cell" if pair else "Its cell",
    )


def _measures(*groups: Sequence[Run]) -> list[tuple[str, ...]]:
    """Return every measure of the model, and each domain's perplexity: its label, and each group's mean."""
    shown = dict.fromkeys(reading for group in groups for run in group for reading, _ in run.readings())
    kept = [reading for reading in shown if reading.stage in (VALIDATION, DEPLOYED) and reading.layer is None]
    kept = [one for one in kept if not one.domain or one.within(VALIDATION) == PERPLEXITY]
    kept.sort(key=lambda one: (one.stage != VALIDATION, measures.MEASURES.index(one.measure)))
    return [_measure(reading, groups) for reading in kept]


def _measure(reading: Reading, groups: Sequence[Sequence[Run]]) -> tuple[str, ...]:
    column = measure_column(reading, finer=int(reading.measure.key == PERPLEXITY.measure.key))
    label = f"perplexity of {reading.domain}" if reading.domain else column.name
    label = f"{label}, as deployed" if reading.stage == DEPLOYED else label
    return (label, *(column.show(fmean(map(column.read, group))) or "-" for group in groups))
