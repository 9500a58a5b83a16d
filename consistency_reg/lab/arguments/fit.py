"""The arguments of ``consistency-reg fit``: its own words, and what they mean among the keys of a recipe."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from consistency_reg.lab.files import check_name
from consistency_reg.lab.recipe_files import find_recipe
from consistency_reg.lab.usage import CommandParser

CONFIG_FILES = (".yaml", ".yml")  # what LightningCLI's own --model and --data take, or a mapping
EXAMPLE = """\
examples:
  consistency-reg fit --config quickstart --run_dir runs/first
  consistency-reg fit --config quickstart --data my.jsonl --consistency.weight 0.1
  consistency-reg fit --config finetune --model runs/first --run_dir runs/tuned
"""


def parser() -> CommandParser:
    """Return the parser of the command, for its help."""
    command = _own_words()
    command.add_argument(
        "--config",
        action="append",
        metavar="RECIPE",
        help="a YAML file, or the name of a recipe that is shipped; several are read one after the other",
    )
    command.add_argument("--run_dir", metavar="DIR", help="folder of the run (runs/run)")
    command.add_argument("--KEY", metavar="VALUE", help="any key of a recipe, such as --trainer.max_steps 200")
    return command


def recipe_words(argv: Sequence[str]) -> list[str]:
    """Return the arguments as LightningCLI takes them: keys of a recipe, and recipes by their files.

    ``--model`` and ``--data`` override what the recipes say of checkpoint and data, wherever they stand.

    Raises:
        ValueError: a word that is neither an option nor a value; a name of data that may not be a file's.
        FileNotFoundError: no such recipe, or no such file of data.
        SystemExit: an option without its value.

    Example:
        >>> words = recipe_words(["--print_config", "--model", "runs/a", "--config", "quickstart", "--data=me/mine"])
        >>> [word for word in words if "quickstart" not in word]
        ['--config', '--model.model.path=runs/a', '--data.data={"mine": {"path": "me/mine"}}', '--print_config']
        >>> recipe_words(["--data", "text/v1.5/"])
        ['--data.data={"v1.5": {"path": "text/v1.5/"}}']
    """
    given, rest = _own_words().parse_known_args(argv)
    if rest and not rest[0].startswith("-"):
        raise ValueError(
            f"{rest[0]} is no option of fit: a recipe is given with `--config {rest[0]}`, a key with `--KEY VALUE`"
        )
    words, data = list[str](), dict[str, dict[str, str]]()
    for name in ("model", "data"):
        words += [f"--{name}={value}" for value in getattr(given, name) if _is_config(value)]
    for before, word in zip(["", *rest], rest, strict=False):
        option, equals, value = word.partition("=")
        if before == "--config":
            word = str(find_recipe(word))
        elif option == "--config" and equals:
            word = f"--config={find_recipe(value)}"
        words.append(word)
    words += [f"--model.model.path={place}" for place in given.model if not _is_config(place)]
    for place in given.data:
        if not _is_config(place):
            source, path = _source(place), Path(os.path.abspath(place))  # which gives "." its name
            called = path.stem if "data_files" in source else path.name
            name = check_name("a domain, here of the file or folder that --data names,", called)
            if name in data:
                raise ValueError(f"--data must name files of different names, got {name!r} again")
            data[name] = source
    if data:
        words.append(f"--data.data={json.dumps(data)}")
    if given.print_config is not None:
        words.append("--print_config" + (f"={given.print_config}" if given.print_config else ""))
    return words


def _own_words() -> CommandParser:
    command = CommandParser(
        "consistency-reg fit",
        description="Train one recipe into one folder. Later recipes and keys override earlier ones. Stopped, it\n"
        "resumes where it was when the same command runs again.",
        epilog=EXAMPLE,
        allow_abbrev=False,
    )
    command.add_argument(
        "--model", action="append", default=[], metavar="PLACE", help="fine-tune a folder, a finished run or a hub id"
    )
    command.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="PLACE",
        help="train on a file of text, JSON lines (text or chats), CSV or Parquet, or a data set of the hub",
    )
    command.add_argument(
        "--print_config", nargs="?", const="", metavar="FLAGS", help="print the recipe with every default, and stop"
    )
    return command


def _source(place: str) -> dict[str, str]:
    from consistency_reg.lab.corpus.sources import local_source  # heavy, and of no use for help

    source = local_source(place)
    return {"path": source.path} | ({} if source.data_files is None else {"data_files": place})


def _is_config(value: str) -> bool:
    return value.startswith("{") or value.endswith(CONFIG_FILES)
