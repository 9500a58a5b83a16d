"""The arguments of ``consistency-reg export``."""

from pathlib import Path

from consistency_reg.lab.usage import CommandParser

EXAMPLE = """\
examples:
  consistency-reg export runs/first --out first.gguf --check   compare llama.cpp's text
  consistency-reg export runs/first --out first-f16.gguf --dtype float16
"""


def parser() -> CommandParser:
    """Return the parser of the command."""
    command = CommandParser(
        "consistency-reg export",
        description="Write a model and its tokenizer as one GGUF file, for llama.cpp and the engines built on it.",
        epilog=EXAMPLE,
    )
    command.add_argument("model", metavar="MODEL", help="folder, finished run, or hub id of a GraniteMoe model")
    command.add_argument("--out", type=Path, required=True, metavar="FILE", help="such as model.gguf")
    command.add_argument("--dtype", default="auto", metavar="NAME", help="float32, float16 or bfloat16 (as saved)")
    command.add_argument("--check", action="store_true", help="compare greedy text in llama.cpp and in transformers")
    return command
