"""The arguments of ``consistency-reg evaluate``."""

from pathlib import Path

from consistency_reg.lab.corpus.names import DOMAIN_NAMES
from consistency_reg.lab.usage import CommandParser, integers, names, numbers

SEQUENCE_LENGTH = 512
METHODS = ("prior", "max_rank", "cumulative")  # of functional.cache_aware, not imported: it loads torch
DTYPES = ("auto", "float32", "bfloat16", "float16")
EXAMPLE = """\
examples:
  consistency-reg evaluate runs/first                                         on the default corpus
  consistency-reg evaluate allenai/OLMoE-1B-7B-0924 --dtype bfloat16 --data my.jsonl
  consistency-reg evaluate --trace olmoe.safetensors --trace other.safetensors     saved routing
"""


def parser() -> CommandParser:
    """Return the parser of the command."""
    command = CommandParser(
        "consistency-reg evaluate",
        description="Judge mixture-of-experts models by their routing, and say how large a cache of experts they need.",
        epilog=EXAMPLE,
    )
    command.add_argument(
        "models", nargs="*", type=labelled, metavar="[NAME=]MODEL", help="folder, finished run, PEFT adapter, or hub id"
    )
    command.add_argument(
        "--trace", action="append", type=Path, default=[], metavar="FILE", help="saved routing, in place of a MODEL"
    )
    command.add_argument("--save-trace", type=Path, metavar="FILE", help="keep the routing of the MODEL")
    command.add_argument("--out", type=Path, default=Path("evaluation"), metavar="DIR", help="default: evaluation")
    command.add_argument("--domains", nargs="+", type=names, metavar="NAME", help=" ".join(DOMAIN_NAMES))
    command.add_argument(
        "--data", action="append", default=[], metavar="PATH", help="file, folder, or data set of the hub"
    )
    command.add_argument("--data-config", rare=True, metavar="NAME", help="configuration of the data set")
    command.add_argument(
        "--split", rare=True, default="train", metavar="NAME", help="such as test or train[:1%%]; default: train"
    )
    command.add_argument(
        "--text-column", rare=True, default="text", metavar="NAME", help="text, or chats; default: text"
    )
    command.add_argument(
        "--seed", rare=True, type=int, default=0, metavar="N", help="which documents are drawn; default: 0"
    )
    command.add_argument("--max-tokens", type=int, default=131_072, metavar="N", help="of all domains; default: 131072")
    command.add_argument(
        "--sequence-length", type=int, metavar="T", help=f"tokens read at once; default: {SEQUENCE_LENGTH}"
    )
    command.add_argument(
        "--corpus-bytes",
        rare=True,
        type=int,
        default=4_500_000,
        metavar="N",
        help="as in the recipe that trained the model",
    )
    command.add_argument(
        "--device", default="auto", metavar="NAME", help="such as cpu or cuda:0; default: cuda if there is one"
    )
    command.add_argument(
        "--dtype", choices=DTYPES, default="auto", metavar="NAME", help=f"{', '.join(DTYPES)}; default: as saved"
    )
    command.add_argument(
        "--batch-size", rare=True, type=int, metavar="B", help="rows to begin with; halved when memory runs out"
    )
    command.add_argument(
        "--trust-remote-code", rare=True, action="store_true", help="run code that comes with the model"
    )
    command.add_argument("--segment-lengths", nargs="+", type=integers, metavar="M", help="default: 4,16,64")
    command.add_argument("--cache-ratios", nargs="+", type=numbers, metavar="RHO", help="slots / K; default: 1,2,3,4")
    command.add_argument(
        "--cache-aware", nargs="+", type=numbers, metavar="S", help="strengths of cache-aware routing to price: 0.1,0.2"
    )
    command.add_argument(
        "--method",
        rare=True,
        choices=METHODS,
        default="prior",
        metavar="NAME",
        help=f"{', '.join(METHODS)}: the routing",
    )
    command.add_argument(
        "--no-shared-cache",
        rare=True,
        dest="shared_cache",
        action="store_false",
        help="skip the one cache for all layers, which is slow for many layers",
    )
    command.add_argument("--replicates", type=int, default=200, metavar="R", help="of the bootstrap; 0: no intervals")
    command.add_argument(
        "--memory", nargs="+", type=names, metavar="SIZE", help="budgets to predict tokens/s for, such as 4GB,8GB"
    )
    command.add_argument("--read-bandwidth", metavar="SIZE", help="of the device, for --memory: such as 1.5GB/s")
    command.add_argument(
        "--compute-ms", rare=True, type=float, metavar="MS", help="of a token whose experts are all there"
    )
    command.add_argument(
        "--bytes-per-weight", rare=True, type=float, metavar="B", help="of a quantization, such as 0.56"
    )
    command.add_argument(
        "--context", rare=True, type=int, metavar="T", help="tokens in the KV cache; default: those read at once"
    )
    command.add_argument(
        "--dense-memory", rare=True, metavar="SIZE", help="of all other weights, where a trace does not tell"
    )
    command.add_argument("--usage-profile", type=Path, metavar="FILE", help="write lines of layer, expert and uses")
    command.add_argument("--wandb", nargs="?", const="consistency-reg", metavar="PROJECT", help="log to wandb too")
    command.add_help_all()
    command.set_defaults(segment_lengths=[[4, 16, 64]], cache_ratios=[[1.0, 2.0, 3.0, 4.0]])
    return command


def labelled(text: str) -> tuple[str, str]:
    """Split ``NAME=PLACE`` into a model's name and its place; the name is empty where only a place is given.

    Example:
        >>> labelled("before=runs/first"), labelled("runs/first"), labelled("runs/lr=3")
        (('before', 'runs/first'), ('', 'runs/first'), ('', 'runs/lr=3'))
    """
    name, equals, place = text.partition("=")
    return (name, place) if equals and place and "/" not in name and not Path(text).exists() else ("", text)
