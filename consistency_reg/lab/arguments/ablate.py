"""The arguments of ``consistency-reg ablate``."""

from pathlib import Path

from consistency_reg.lab.usage import CommandParser

EXAMPLE = """\
example:
  consistency-reg ablate demo --jobs 2
  consistency-reg report runs/demo
  RAY_ADDRESS=HOST:6379 consistency-reg ablate GRID --launcher ray --gpus 1  (shared files)

Stopped, it resumes where it was when the same command runs again; finished cells are not run twice.
"""


def parser() -> CommandParser:
    """Return the parser of the command."""
    command = CommandParser(
        "consistency-reg ablate",
        description="Train every cell of a grid over a recipe's keys, each in a folder of its own.",
        epilog=EXAMPLE,
    )
    command.add_argument(
        "grid", type=Path, metavar="GRID", help="YAML file of recipe, runs, seeds, and grid or cells; or a shipped name"
    )
    command.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="cells at a time: on this machine 1 unless told otherwise, its threads divided; with Ray as many as fit",
    )
    command.add_argument(
        "--launcher", choices=("local", "ray"), default="local", help="this machine, or those of a Ray cluster"
    )
    command.add_argument("--cpus", type=int, metavar="N", help="with Ray: CPUs, and threads, of a cell (default 1)")
    command.add_argument("--gpus", type=float, metavar="N", help="with Ray: GPUs of a cell (default 0: it sees none)")
    command.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="AXIS=LABEL",
        help="only the cells with these values; also seed=N; of one axis any",
    )
    command.add_argument("--dry-run", action="store_true", help="check the grid and list its cells")
    command.add_argument("--export-sweep", type=Path, metavar="FILE", help="write the grid as a wandb sweep and stop")
    return command
