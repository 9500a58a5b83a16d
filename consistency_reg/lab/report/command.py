"""The command ``consistency-reg report``."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from consistency_reg.lab.arguments.report import parser
from consistency_reg.lab.files import write_atomically
from consistency_reg.lab.pricing import rows as prices
from consistency_reg.lab.render.markdown import document, update
from consistency_reg.lab.render.outputs import check_writable, write_pictures
from consistency_reg.lab.render.table import Table
from consistency_reg.lab.render.terminal import print_tables, print_verdict
from consistency_reg.lab.report.explore import page, title
from consistency_reg.lab.report.figures import DRAWN, pictures
from consistency_reg.lab.report.findings import Findings
from consistency_reg.lab.report.pairs import pair_runs
from consistency_reg.lab.report.records import (
    append_csv,
    fingerprint,
    prices_beside,
    read_csv,
    write_csv,
    write_json,
    write_prices,
)
from consistency_reg.lab.report.runs import Run, attach, distinct_names, read_folder, refuse_different_data
from consistency_reg.lab.report.verdict import verdict
from consistency_reg.lab.report.wandb_runs import PREFIX, read_wandb
from consistency_reg.lab.wandb_login import open_run
from consistency_reg.optional import require
from consistency_reg.tracking.artifacts import log_artifact

REPORT_FILES = ("report.html", "tables.md", "table.csv", "table.json")
MOST_PLACES = 6


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``consistency-reg report``: tables on the terminal, and CSV, JSON, PNGs and HTML in a folder."""
    options = parser().parse_args(argv)
    folder = options.out or default_folder(options.runs)
    _check_places(options, folder)
    runs = gather(options.runs)
    refuse_different_data(runs)
    findings = Findings(runs, pair_runs(runs, options.baseline), options.baseline)
    if options.append_csv is not None:
        added = append_csv(runs, options.append_csv)
        print(f"{options.append_csv}: {added} rows added, {len(runs) - added} were there")
        if any(run.priced for run in runs):
            priced = write_prices(runs, options.append_csv)
            print(f"{prices_beside(options.append_csv)}: {priced} rows added")
    tables = findings.tables()
    print_tables(reversed(tables))  # the last lines of a terminal are what is read first
    drawn = write_report(folder, ", ".join(Path(source).stem for source in options.runs), findings, tables)
    print(f"{folder}: {', '.join([*REPORT_FILES, *(path.name for path in drawn.values())])}")
    if options.pictures is not None:
        write_pictures(options.pictures, {name: path.read_bytes() for name, path in drawn.items()}, DRAWN)
    for path in options.update:
        found = sum(update(path, source, tables) for source in options.runs if not is_prices(source))
        print(f"{path}: {found} tables")
    if options.wandb:
        log_to_wandb(options.wandb, folder, tables, drawn)
    places = [run.wandb_dir for run in runs if run.wandb_dir] + ([str(folder / "wandb")] if options.wandb else [])
    for place in list(dict.fromkeys(places))[-MOST_PLACES:]:
        print(f"wandb: {place}")
    if (more := len(set(places)) - MOST_PLACES) > 0:
        print(f"wandb: {more} more beside these")
    print_verdict(verdict(findings))
    return 0


def _check_places(options: argparse.Namespace, folder: Path) -> None:
    """Raise ValueError if something could not be written after the work; nothing is read or written before."""
    check_writable("--out", folder)
    if options.pictures is not None:
        check_writable("--pictures", options.pictures)
    if options.append_csv is not None:
        check_writable("the folder of --append-csv", options.append_csv.parent)
    for path in options.update:
        if not path.is_file():
            raise ValueError(f"--update must name a Markdown file that is there, got {path}")
        check_writable("the folder of --update", path.parent)


def gather(sources: Sequence[str]) -> list[Run]:
    """Return the runs of all sources with their prices; says on standard error what is not finished.

    Args:
        sources: run folders, folders of run folders, CSV files of runs or of prices, and addresses such as
            ``wandb:ENTITY/PROJECT``.

    Raises:
        ValueError: a source that is none of these; prices alone.
    """
    runs: list[Run] = []
    priced: list[prices.Row] = []
    for source in sources:
        unfinished: list[str] = []
        if source.startswith(PREFIX):
            finished, unfinished = read_wandb(source)
        elif is_prices(source):
            finished, priced = [], prices.merge(priced, prices.read(Path(source)))
        elif Path(source).is_file():
            finished = read_csv(Path(source))
        else:
            finished, unfinished = read_folder(Path(source))
        runs += finished
        if unfinished:
            print(f"{source}: left out, not finished: {', '.join(unfinished)}", file=sys.stderr)
    if not runs:
        raise ValueError(f"{', '.join(sources)}: prices alone make no report: give their runs too")
    return distinct_names(attach(runs, priced) if priced else runs)


def is_prices(source: str) -> bool:
    """Return whether a source is a CSV of ``consistency-reg price``."""
    return Path(source).is_file() and prices.holds_prices(Path(source))


def default_folder(sources: Sequence[str]) -> Path:
    """Return where the files go: into the only folder that is reported on, else into ``report``."""
    return Path(sources[0], "report") if len(sources) == 1 and Path(sources[0]).is_dir() else Path("report")


def write_report(folder: Path, source: str, findings: Findings, tables: Sequence[Table]) -> dict[str, Path]:
    """Write ``report.html``, ``tables.md``, ``table.csv``, ``table.json`` and the PNGs; return the PNGs' paths."""
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(findings.runs, folder / "table.csv")
    write_json(findings.runs, folder / "table.json")
    prices_beside(folder / "table.csv").unlink(missing_ok=True)  # of an earlier report
    write_prices(findings.runs, folder / "table.csv")
    drawn = write_pictures(folder, pictures(findings, source=fingerprint(findings.runs)), DRAWN)
    said = verdict(findings)
    write_atomically(folder / "tables.md", document(title(source, findings.runs), tables, str(said)))
    write_atomically(folder / "report.html", page(source, findings, tables, said))
    return drawn


def log_to_wandb(project: str, folder: Path, tables: Sequence[Table], drawn: Mapping[str, Path]) -> None:
    """Log tables, figures, the page and all files as an artifact to one wandb run; offline without a login."""
    with require("wandb"):
        import wandb
    name = f"report {folder.parent.name}"
    with open_run(project, folder, job_type="report", name=name) as run:
        for table in tables:
            run.log(
                {f"report/{table.title}": wandb.Table(columns=list(table.header), data=[list(r) for r in table.rows])}
            )
        run.log({f"report/{name}": wandb.Image(str(path)) for name, path in drawn.items()})
        run.log({"report/page": wandb.Html((folder / "report.html").read_text(), inject=False)})
        log_artifact(run, name, "report", [*(folder / file for file in REPORT_FILES), *drawn.values()])
