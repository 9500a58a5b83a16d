"""The command ``consistency-reg report``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from consistency_reg.files import write_atomically
from consistency_reg.optional import require
from consistency_reg.report.page import page
from consistency_reg.report.pairs import Pair, pair_runs
from consistency_reg.report.plots import save, tradeoff
from consistency_reg.report.records import append_csv, read_csv, write_csv, write_json
from consistency_reg.report.runs import Run, distinct_names, read_folder, refuse_different_data
from consistency_reg.report.tables import Table, pair_table, run_tables
from consistency_reg.wandb_login import offline_without_login

with require("plots"):
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

EXAMPLE = """\
examples:
  consistency-reg report runs/demo                      the cells of an ablation
  consistency-reg report runs/a runs/b --baseline a     single runs
  consistency-reg report recipes/results/demo.csv       committed results
"""
NARROWEST = 120


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``consistency-reg report``: tables on the terminal, and CSV, JSON, PNG and HTML in a folder."""
    options = _parser().parse_args(argv)
    runs = gather(options.runs)
    refuse_different_data(runs)
    pairs = pair_runs(runs, options.baseline)
    if options.append_csv is not None:
        added = append_csv(runs, options.append_csv)
        print(f"{options.append_csv}: {added} rows added, {len(runs) - added} were there")
    measured, compared = run_tables(runs), [pair_table(pairs)] if pairs else []
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, NARROWEST)
    for table in [*measured, *compared]:  # the last lines of a terminal are what is read first
        print_table(table, console)
    folder = options.out or default_folder(options.runs)
    write_report(folder, ", ".join(path.name for path in options.runs), runs, pairs, [*compared, *measured])
    print(f"figures, tables and page: {folder / 'tradeoff.png'}, table.csv, table.json, report.html")
    if options.wandb:
        log_to_wandb(options.wandb, folder, [*compared, *measured])
    places = [run.wandb_dir for run in runs if run.wandb_dir] + ([str(folder / "wandb")] if options.wandb else [])
    for place in dict.fromkeys(places):
        print(f"wandb: {place}")
    return 0


def gather(paths: Sequence[Path]) -> list[Run]:
    """The runs in run folders, folders of run folders, and CSV files; says on standard error what is not finished.

    Raises:
        ValueError: a path that is none of these.
    """
    runs: list[Run] = []
    for path in paths:
        if path.is_file():
            runs += read_csv(path)
            continue
        finished, unfinished = read_folder(path)
        runs += finished
        if unfinished:
            names = ", ".join(run.name for run in unfinished)
            print(f"{path}: left out, not finished: {names}", file=sys.stderr)
    return distinct_names(runs)


def default_folder(paths: Sequence[Path]) -> Path:
    """Where the files go: into the only folder that is reported on, else into ``report``."""
    return paths[0] / "report" if len(paths) == 1 and paths[0].is_dir() else Path("report")


def write_report(folder: Path, title: str, runs: Sequence[Run], pairs: Sequence[Pair], tables: Sequence[Table]) -> None:
    """Write ``table.csv``, ``table.json``, ``tradeoff.png`` and ``report.html``."""
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(runs, folder / "table.csv")
    write_json(runs, folder / "table.json")
    picture = folder / "tradeoff.png"
    save(tradeoff(runs, pairs), picture)
    figures = [("perplexity against LRU misses and against SRP", picture.read_bytes())]
    write_atomically(folder / "report.html", page(f"Report: {title}", tables, figures, runs))


def log_to_wandb(project: str, folder: Path, tables: Sequence[Table]) -> None:
    """One wandb run, in the folder, that holds the tables, the figure and the page; offline where there is no login."""
    with require("wandb"):
        import wandb
    offline_without_login()
    with wandb.init(project=project, job_type="report", name=f"report {folder.parent.name}", dir=folder) as run:
        for table in tables:
            run.log(
                {f"report/{table.title}": wandb.Table(columns=list(table.header), data=[list(r) for r in table.rows])}
            )
        run.log({"report/tradeoff": wandb.Image(str(folder / "tradeoff.png"))})
        run.log({"report/page": wandb.Html((folder / "report.html").read_text(), inject=False)})


def print_table(table: Table, console: Console) -> None:
    """Print a table; a narrow terminal wraps its header."""
    title = Text(table.title, style="bold")
    shown = RichTable(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for index, name in enumerate(table.header):
        shown.add_column(Text(name), justify="left" if index == 0 else "right", overflow="fold", no_wrap=index == 0)
    for row in table.rows:
        shown.add_row(*(Text(cell) for cell in row), style="red" if row[0].endswith("(collapsed)") else None)
    console.print(shown)
    if table.note:
        console.print(Text(f"{table.note}\n", style="dim"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="consistency-reg report",
        description="Compare finished runs: perplexity, consistency, cache hits, balance, and what each run\n"
        "changes against the run without the consistency term and with all else equal.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUNS", help="run folders, folders of them, results CSVs")
    parser.add_argument("--baseline", metavar="NAME", help="compare all with this run, or with this cell seed by seed")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the files (RUNS/report, or report)")
    parser.add_argument("--wandb", metavar="PROJECT", help="log tables and figures as a run of this wandb project")
    parser.add_argument("--append-csv", type=Path, metavar="FILE", help="add a row a run to this CSV, for committing")
    return parser
