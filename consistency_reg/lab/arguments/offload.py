"""The arguments of ``consistency-reg offload``."""

from pathlib import Path

from consistency_reg.lab.usage import CommandParser, numbers

EXAMPLE = """\
examples:
  consistency-reg offload runs/baseline runs/regularized               2K slots a layer, from disk
  consistency-reg offload my-olmoe --memory 2GB --prompt question.txt  within a budget
  consistency-reg offload runs/regularized --cache-aware 0,0.1 --calibrate
"""


def parser() -> CommandParser:
    """Return the parser of the command."""
    command = CommandParser(
        "consistency-reg offload",
        description="Generate from models whose experts are read from disk as tokens need them, and time every token.",
        epilog=EXAMPLE,
    )
    command.add_argument("models", nargs="+", metavar="MODEL", help="folder, finished run, or hub id of a model")
    command.add_argument("--prompt", action="append", type=Path, default=[], metavar="FILE", help="text to continue")
    command.add_argument("--tokens", type=int, default=256, metavar="N", help="to write for each prompt; default: 256")
    command.add_argument("--memory", metavar="SIZE", help="for weights and slots together, such as 2GB")
    command.add_argument("--slots", type=int, metavar="N", help="of every layer")
    command.add_argument("--cache-ratio", type=float, metavar="RHO", help="slots / K of every layer; default: 2")
    command.add_argument(
        "--spread", default="equal", metavar="NAME", help="equal, auto (by measured hits) or shared; default: equal"
    )
    command.add_argument("--policy", default="lru", metavar="NAME", help="lru or lfu; default: lru")
    command.add_argument(
        "--cache-aware", type=numbers, metavar="S", help="bias to slots, such as 0,0.1; by default config.json has it"
    )
    command.add_argument("--store", default="disk", metavar="NAME", help="disk or host memory; default: disk")
    command.add_argument("--reads", default="direct", metavar="NAME", help="direct or buffered; default: direct")
    command.add_argument("--read-bandwidth", metavar="SIZE", help="of a slower disk, such as 500MB/s")
    command.add_argument("--device", default="cpu", metavar="NAME", help="such as cpu or cuda:0; default: cpu")
    command.add_argument("--dtype", default="auto", metavar="NAME", help="float32, bfloat16 or float16 (as saved)")
    command.add_argument("--temperature", type=float, default=1.0, metavar="T", help="0: the likeliest; default: 1")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of the drawn tokens; default: 0")
    command.add_argument("--read", action="store_true", help="read the prompts token by token instead, with perplexity")
    command.add_argument("--calibrate", action="store_true", help="measure reads and computing; predict tokens/s")
    command.add_argument("--out", type=Path, default=Path("offload"), metavar="DIR", help="default: offload")
    command.add_argument("--wandb", nargs="?", const="consistency-reg", metavar="PROJECT", help="log to wandb too")
    return command
