"""The arguments of ``consistency-reg cloze``."""

from pathlib import Path

from consistency_reg.lab.arguments.evaluate import DTYPES
from consistency_reg.lab.corpus.names import DOMAIN_NAMES
from consistency_reg.lab.usage import CommandParser, numbers

EXAMPLE = """\
examples:
  consistency-reg cloze runs/baseline runs/regularized
  consistency-reg cloze smollm2-135m runs/upcycle --items 50 --csv cloze.csv
  consistency-reg cloze runs/regularized --cache-aware 0,0.1
"""


def parser() -> CommandParser:
    """Return the parser of the command."""
    command = CommandParser(
        "consistency-reg cloze",
        description="Let language models, mixtures or dense, say which of four continuations is a passage's own, on\n"
        "held-out text. Wrong ones are of the same document where it is long enough. Models of one\n"
        "tokenizer get the same questions, and are compared with the first.",
        epilog=EXAMPLE,
    )
    command.add_argument(
        "models", nargs="+", metavar="MODEL", help="folder, finished run, PEFT adapter, hub id, or smollm2-135m"
    )
    command.add_argument("--items", type=int, default=25, metavar="N", help="questions of each domain; default: 25")
    command.add_argument("--passage", type=int, default=12, metavar="T", help="tokens that are read; default: 12")
    command.add_argument("--continuation", type=int, default=4, metavar="T", help="tokens to choose; default: 4")
    command.add_argument(
        "--domains", nargs="+", default=list(DOMAIN_NAMES), metavar="NAME", help=" ".join(DOMAIN_NAMES)
    )
    command.add_argument("--cache-aware", type=numbers, metavar="S", help="strengths of cache-aware routing: 0,0.1")
    command.add_argument("--cache-ratio", type=float, default=2.0, metavar="RHO", help="slots / K; default: 2")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of the questions; default: 0")
    command.add_argument(
        "--corpus-bytes", type=int, default=4_500_000, metavar="N", help="as in the recipe that trained the model"
    )
    command.add_argument("--device", default="cpu", metavar="NAME", help="such as cuda; default: cpu")
    command.add_argument(
        "--dtype", choices=DTYPES, default="auto", metavar="NAME", help=f"{', '.join(DTYPES)}; default: as saved"
    )
    command.add_argument("--csv", type=Path, metavar="FILE", help="add the rows to a CSV file")
    command.set_defaults(cache_aware=[0.0])
    return command
