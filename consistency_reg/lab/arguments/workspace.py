"""The arguments of ``consistency-reg workspace``."""

from consistency_reg.lab.usage import CommandParser

EXAMPLE = """\
example:
  consistency-reg workspace my-team/consistency-reg
"""


def parser() -> CommandParser:
    """Return the parser of the command."""
    command = CommandParser(
        "consistency-reg workspace",
        description="Lay out the panels of a wandb project for reading trade-offs, as a saved view of it.",
        epilog=EXAMPLE,
    )
    command.add_argument("project", metavar="ENTITY/PROJECT", help="where the runs are")
    command.add_argument("--quality", default="val/ppl", metavar="METRIC", help="what misses are traded for (val/ppl)")
    command.add_argument("--segment-length", type=int, default=16, metavar="M", help="of SRP in the panels (16)")
    return command
