"""What is wrong with a recipe, in a sentence: jsonargparse's errors, and the keys that may have been meant."""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

ALL_KEYS = "`consistency-reg fit --print_config` shows every key"


def explain(message: str, keys: Iterable[str]) -> str:
    """What an error of the parser means to who wrote the recipe; the message itself where that is not known.

    Args:
        message: of jsonargparse.
        keys: that a recipe may hold, with dots.

    Example:
        >>> explain("unrecognized arguments: --consistency.wieght 1", ["consistency.weight"])
        'a recipe has no key consistency.wieght; is consistency.weight meant? `consistency-reg fit --print_config` shows every key'
    """  # noqa: E501
    if found := re.match(r"unrecognized arguments: (\S+)", message):
        word = found[1]
        return _no_key(word[2:].split("=")[0], keys) if word.startswith("--") else _no_option(word)
    if found := re.match(r'Parser key "config": (File does not exist|Path is not a file): (.*)', message):
        wrong = "there is no recipe" if "exist" in found[1] else "a recipe is a file, which is not true of"
        return f"--config: {wrong} {found[2]}"
    if found := re.match(r"Problems parsing config: (.*)|Unexpected config: (.*)", message, flags=re.DOTALL):
        return f"--config takes a file of YAML keys and values: {found[1] or f'got {found[2]}'}"
    if found := re.match(r"Group '(.*)' does not accept option '(.*)'", message):
        return _no_key(f"{found[1]}.{found[2]}", keys)
    if found := re.match(r"Option '(.*)' is not accepted", message):
        return _no_key(found[1], keys)
    if found := re.match(r'Parser key "(.*?)":\s+(.*)', message, flags=re.DOTALL):
        return f"{found[1]}: {_wrong_value(found[2])}"
    return message


def recipe_keys(parser: Any) -> list[str]:
    """The keys that a recipe may hold, with dots: those of the parser's defaults and all above them."""
    leaves = parser.get_defaults().keys()
    return sorted({key.rsplit(".", up)[0] for key in leaves for up in range(key.count(".") + 1)})


def _no_option(word: str) -> str:
    return f"{word} is no option of fit: a recipe is given with `--config {word}`, a key with `--KEY VALUE`"


def _no_key(key: str, keys: Iterable[str]) -> str:
    near = get_close_matches(key, list(keys), n=1, cutoff=0.75)
    return f"a recipe has no key {key}; {f'is {near[0]} meant? ' if near else ''}{ALL_KEYS}"


def _wrong_value(said: str) -> str:
    """What jsonargparse says of a value, without the alternatives that were not tried to be met."""
    if found := re.search(r"Problem with given class_path '(.*?)':\s+(.*?)(?:\n\s+- |\n\s+Given|\Z)", said, re.DOTALL):
        return f"{_of_class(found[1], found[2])}"
    if found := re.search(r"Expected a dot import path string: (\S+)", said):
        return f"must be the import path of a class, such as consistency_reg.LocalConsistencyLoss, got {found[1]!r}"
    if found := re.search(r"Expected a typing.Literal\[(.*)\]. Got value: (.*)", said):
        return f"must be one of {found[1]}, got {found[2]!r}"
    if found := re.search(r"Expected a <class '(\w+)'>. Got value: (.*)", said):
        return f"must be of type {found[1]}, got {found[2]!r}"
    return said


def _of_class(class_path: str, said: str) -> str:
    if found := re.match(r"Option '(.*)' is not accepted|Group '.*' does not accept option '(.*)'", said):
        return f"{class_path} has no option {(found[1] or found[2])!r}"
    if found := re.match(r'Parser key "(.*?)":\s+(.*)', said, flags=re.DOTALL):
        return f"{found[1]} of {class_path} {_wrong_value(found[2])}"
    return f"{class_path}: {said}"
