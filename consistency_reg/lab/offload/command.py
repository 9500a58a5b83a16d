"""``consistency-reg offload``: run models whose experts are read as tokens need them, and time every token."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from consistency_reg.lab.arguments.offload import parser
from consistency_reg.lab.files import write_atomically
from consistency_reg.lab.offload.measure import Measured
from consistency_reg.lab.offload.run import measure
from consistency_reg.lab.offload.show import PICTURE, tables, to_csv, to_json, token_time
from consistency_reg.lab.offload.tracking import log_to_wandb
from consistency_reg.lab.provenance import device_name, git_commit, package_versions
from consistency_reg.lab.render.outputs import check_writable, write_pictures
from consistency_reg.lab.render.terminal import print_tables
from consistency_reg.optional import require

with require("plots"):
    from rich.console import Console

PROMPTS = (
    "The committee met on Tuesday to discuss the budget for the coming year.",
    'def read_lines(path):\n    """Return the lines of a file."""\n',
    "In the beginning there was nothing but water, and",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``consistency-reg offload``: a table and texts on the terminal, JSON, CSV and a picture in a folder."""
    options = _options(argv)
    prompts = _prompts(options)
    console = Console(soft_wrap=True)
    measured = [one for place in options.models for one in measure(place, prompts, options, console)]
    print_tables(tables(measured))
    command = shlex.join(["consistency-reg", "offload", *(argv or ())])
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
    options = parser().parse_args(argv)
    given = [name for name in ("memory", "slots", "cache_ratio") if getattr(options, name) is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join('--' + name.replace('_', '-') for name in given)} are budgets: give one")
    options.cache_ratio = 2.0 if options.cache_ratio is None else options.cache_ratio
    if options.tokens < 1:
        raise ValueError(f"--tokens must be at least 1, got {options.tokens}")
    if not options.temperature >= 0:
        raise ValueError(f"--temperature must be 0 or more, got {options.temperature}")
    if any(not strength >= 0 for strength in options.cache_aware or ()):
        raise ValueError(f"--cache-aware must be 0 or more, got {options.cache_aware}")
    check_writable("--out", options.out)
    return options
