"""The arguments of ``consistency-reg upcycle``."""

from pathlib import Path

from consistency_reg.lab.corpus.names import DOMAIN_NAMES
from consistency_reg.lab.usage import CommandParser

SMOLLM = "smollm2-135m"
EXAMPLE = """\
examples:
  consistency-reg upcycle smollm2-135m --out runs/split --splits 16 --top-k 8   neurons split
  consistency-reg upcycle smollm2-135m --out runs/moe --splits 8 --copies 4 --layers 20-29
  consistency-reg fit --config finetune --model runs/moe --model.model.train all
"""


def parser() -> CommandParser:
    """Return the parser of the command."""
    command = CommandParser(
        "consistency-reg upcycle",
        description="Turn a dense language model into a mixture of experts of a stock transformers architecture.",
        epilog=EXAMPLE,
    )
    command.add_argument("dense", metavar="DENSE", help=f"folder or hub id of a dense model, or {SMOLLM}")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the mixture goes")
    command.add_argument("--splits", type=int, default=8, metavar="S", help="parts of an MLP; 1 copies it; default: 8")
    command.add_argument("--copies", type=int, default=1, metavar="C", help="S * C experts in all; default: 1")
    command.add_argument("--top-k", type=int, default=4, metavar="K", help="experts that a token uses; default: 4")
    command.add_argument("--shared", type=float, default=0.0, metavar="SHARE", help="of the neurons, always active")
    command.add_argument("--layers", metavar="RANGES", help="such as 0,2,10-12; default: all")
    command.add_argument("--router-scale", type=float, default=0.2, metavar="SD", help="of the logits; default: 0.2")
    command.add_argument("--calibration-tokens", type=int, default=8192, metavar="N", help="default: 8192")
    command.add_argument(
        "--domains", nargs="+", default=list(DOMAIN_NAMES), metavar="NAME", help=" ".join(DOMAIN_NAMES)
    )
    command.add_argument(
        "--no-refit", dest="refit", action="store_false", help="keep the output projections of the dense model"
    )
    command.add_argument("--bf16", action="store_true", help="read the calibration text with matrices in bfloat16")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of the clustering; default: 0")
    return command
