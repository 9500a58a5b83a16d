"""The arguments of ``consistency-reg price``."""

from pathlib import Path

from consistency_reg.lab.arguments.evaluate import METHODS
from consistency_reg.lab.usage import CommandParser, names, numbers

STRENGTHS = (0.0, 0.05, 0.1, 0.2, 0.3)
EXAMPLE = """\
examples:
  consistency-reg price runs/first           at strengths 0 to 0.3, 2K slots a layer
  consistency-reg price runs/demo --cache-aware 0,0.1 --cache-ratios 1,2,4
  consistency-reg report runs/demo           shows the prices beside the trained runs
"""


def parser() -> CommandParser:
    """Return the parser of the command."""
    command = CommandParser(
        "consistency-reg price",
        description="Measure what routing that knows the cache costs and saves on finished runs, each on its own\n"
        "validation text. The rows are kept next to each run, where `consistency-reg report` finds them;\n"
        "what is there already is not measured again.",
        epilog=EXAMPLE,
    )
    command.add_argument("runs", nargs="+", type=Path, metavar="RUNS", help="run folders, and folders of them")
    command.add_argument(
        "--cache-aware", nargs="+", type=numbers, metavar="S", help="strengths; default of prior: 0,0.05,0.1,0.2,0.3"
    )
    command.add_argument("--cache-ratios", nargs="+", type=numbers, metavar="RHO", help="slots / K; default: 2")
    command.add_argument("--method", choices=METHODS, default="prior", metavar="NAME", help=", ".join(METHODS))
    command.add_argument("--guaranteed", type=int, default=1, metavar="N", help="best experts that stay; default: 1")
    command.add_argument(
        "--domains", nargs="+", type=names, metavar="NAME", help="of the default corpus, instead of a run's own text"
    )
    command.add_argument("--device", default="cpu", metavar="NAME", help="such as cuda; default: cpu")
    command.set_defaults(cache_ratios=[[2.0]], domains=[])
    return command
