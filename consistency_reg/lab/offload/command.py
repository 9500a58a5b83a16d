"""``consistency-reg offload``: run models whose experts are read as tokens need them, and time every token."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from consistency_reg.lab.files import write_atomically
from consistency_reg.lab.offload.measure import Measured
from consistency_reg.lab.offload.run import measure
from consistency_reg.lab.offload.show import PICTURE, tables, to_csv, to_json, token_time
from consistency_reg.lab.offload.tracking import log_to_wandb
from consistency_reg.lab.provenance import device_name, git_commit, package_versions
from consistency_reg.lab.render.outputs import check_writable, write_pictures
from consistency_reg.lab.render.terminal import print_tables
from consistency_reg.lab.usage import CommandParser
from consistency_reg.optional import require

with require("plots"):
    from rich.console import Console

PROMPTS = (
    "The committee met on Tuesday to discuss the budget for the coming year.",
    'def read_lines(path):\n    """Return the lines of a file."""\n',
    "In the beginning there was nothing but water, and",
)
EXAMPLE = """\
examples:
  consistency-reg offload runs/baseline runs/regularized               2K slots a layer, from disk
  consistency-reg offload my-olmoe --memory 2GB --prompt question.txt  within a budget
  consistency-reg offload runs/regularized --cache-aware 0,0.1 --calibrate
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``consistency-reg offload``: a table and texts on the terminal, JSON, CSV and a picture in a folder."""
    options = _options(argv)
    prompts = _prompts(options)
    console = Console(soft_wrap=True)
    measured = [one for place in options.models for one in measure(place, prompts, options, console)]
    print_tables(tables(measured))
    command = shlex.join(["consistency-reg", "offload", *(sys.argv[2:] if argv is None else argv)])
    about: dict[str, Any] = {"command": command, "git_commit": git_commit(), "versions": package_versions()}
    about |= {"machine": device_name(options.device), "threads": torch.get_num_threads()}
    pictures = write(options.out, measured, about)
    print(f"{options.out}: offload.json, tokens.csv, {', '.join(path.name for path in pictures.values())}")
    if options.wandb is not None:
        log_to_wandb(options.wandb, measured, pictures, options.out)
    return 0


def write(folder: Path, measured: Sequence[Measured], about: dict[str, Any]) -> dict[str, Path]:
    """Write ``offload.json``, ``tokens.csv`` and the picture, each whole or not at all."""
    texts = {"offload.json": to_json(measured, about), "tokens.csv": to_csv(measured)}
    pictures = {PICTURE: token_time(measured)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_atomically(folder / name, text)
    return write_pictures(folder, pictures, [PICTURE])


def _prompts(options: argparse.Namespace) -> list[str]:
    if not options.prompt:
        return list(PROMPTS)
    texts = [path.read_text(encoding="utf-8") for path in options.prompt]
    if empty := [str(path) for path, text in zip(options.prompt, texts, strict=True) if not text.strip()]:
        raise ValueError(f"--prompt must be a file with text, got the empty {', '.join(empty)}")
    return texts


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options, without those that could only fail after the models have run."""
    options = _parser().parse_args(argv)
    given = [name for name in ("memory", "slots", "cache_ratio") if getattr(options, name) is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join('--' + name.replace('_', '-') for name in given)} are budgets: give one")
    options.cache_ratio = 2.0 if options.cache_ratio is None else options.cache_ratio
    if options.tokens < 1:
        raise ValueError(f"--tokens must be at least 1, got {options.tokens}")
    if not options.temperature >= 0:
        raise ValueError(f"--temperature must be 0 or more, got {options.temperature}")
    if any(not strength >= 0 for strength in options.cache_aware):
        raise ValueError(f"--cache-aware must be 0 or more, got {options.cache_aware}")
    check_writable("--out", options.out)
    return options


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "consistency-reg offload",
        description="Generate from models whose experts are read from disk as tokens need them, and time every token.",
        epilog=EXAMPLE,
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folder, finished run, or hub id of a model")
    parser.add_argument("--prompt", action="append", type=Path, default=[], metavar="FILE", help="text to go on from")
    parser.add_argument("--tokens", type=int, default=256, metavar="N", help="to write for each prompt; default: 256")
    parser.add_argument("--memory", metavar="SIZE", help="for weights and slots together, such as 2GB")
    parser.add_argument("--slots", type=int, metavar="N", help="of every layer")
    parser.add_argument("--cache-ratio", type=float, metavar="RHO", help="slots / K of every layer; default: 2")
    parser.add_argument(
        "--spread", default="equal", metavar="NAME", help="equal, auto (by measured hits) or shared; default: equal"
    )
    parser.add_argument("--policy", default="lru", metavar="NAME", help="lru or lfu; default: lru")
    parser.add_argument(
        "--cache-aware", type=_strengths, default=[0.0], metavar="S", help="bias to slots, such as 0,0.1"
    )
    parser.add_argument("--store", default="disk", metavar="NAME", help="disk or host memory; default: disk")
    parser.add_argument("--reads", default="direct", metavar="NAME", help="direct or buffered; default: direct")
    parser.add_argument("--read-bandwidth", metavar="SIZE", help="of a slower disk, such as 500MB a second")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="such as cpu or cuda:0; default: cpu")
    parser.add_argument("--dtype", default="auto", metavar="NAME", help="float32, bfloat16, float16; default: as saved")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="0: the likeliest; default: 1")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the drawn tokens; default: 0")
    parser.add_argument("--read", action="store_true", help="read the prompts token by token instead, with perplexity")
    parser.add_argument("--calibrate", action="store_true", help="measure reads and computing; predict tokens/s")
    parser.add_argument("--out", type=Path, default=Path("offload"), metavar="DIR", help="default: offload")
    parser.add_argument("--wandb", nargs="?", const="consistency-reg", metavar="PROJECT", help="log to wandb too")
    return parser


def _strengths(text: str) -> list[float]:
    return [float(value) for value in text.split(",") if value]
