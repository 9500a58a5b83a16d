"""The arguments of ``consistency-reg report``."""

from pathlib import Path

from consistency_reg.lab.usage import CommandParser

EXAMPLE = """\
examples:
  consistency-reg report runs/demo                      the cells of an ablation
  consistency-reg report runs/a runs/b --baseline a     single runs
  consistency-reg report recipes/results/demo.csv       committed results
  consistency-reg report wandb:me/project/demo          a group of runs in wandb
"""


def parser() -> CommandParser:
    """Return the parser of the command."""
    command = CommandParser(
        "consistency-reg report",
        description="Compare finished runs: perplexity, consistency, cache hits, balance, and what each run\n"
        "changes against the run without the consistency term and with all else equal.",
        epilog=EXAMPLE,
    )
    command.add_argument(
        "runs",
        nargs="+",
        metavar="RUNS",
        help="run folders, folders of them, CSVs of runs or prices, wandb:ENTITY/PROJECT[/GROUP]",
    )
    command.add_argument("--baseline", metavar="NAME", help="compare all with this run, or with this cell seed by seed")
    command.add_argument("--out", type=Path, metavar="DIR", help="folder of the files (RUNS/report, or report)")
    command.add_argument("--pictures", type=Path, metavar="DIR", help="write the figures here too, for committing")
    command.add_argument(
        "--update",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="renew the tables in a Markdown file",
    )
    command.add_argument("--append-csv", type=Path, metavar="FILE", help="add a row a run to this CSV, for committing")
    command.add_argument("--wandb", metavar="PROJECT", help="log tables and figures as a run of this wandb project")
    return command
