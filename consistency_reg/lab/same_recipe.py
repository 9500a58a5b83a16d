"""Compare the recipe of a run folder with the one that is asked for now."""

import contextlib
from collections.abc import Callable
from typing import Any

from consistency_reg.moved import present_path
from consistency_reg.optional import require

with require("lightning"):
    import yaml

NOT_OF_THE_RECIPE = {"run_dir"}  # it is this folder, whatever it is called from here
LENGTHS = ("trainer.max_steps", "trainer.max_epochs")  # -1 is without end


def differences(there: str, now: str, complete: Callable[[dict[str, Any]], str]) -> dict[str, tuple[Any, Any]]:
    """Return the keys in which two recipes differ, with the value of each; a class may go by a former path.

    Args:
        there: the YAML of the recipe that the folder has, which may lack keys that have been added since.
        now: the YAML of the one that is asked for.
        complete: turns a recipe into YAML with every default; may raise what it likes on a recipe of former times.

    Example:
        >>> there, now = "a: {path: consistency_reg.lm.module.CausalMoE}", "a: {path: consistency_reg.lab.module.CausalMoE}"
        >>> differences(there, now, yaml.safe_dump), differences("b: 1", "b: 2", yaml.safe_dump)
        ({}, {'b': (1, 2)})
    """  # noqa: E501
    former = yaml.safe_load(there)
    new, old = _flatten(yaml.safe_load(now)), _flatten(former)
    if old.keys() != new.keys() and isinstance(former, dict):
        with contextlib.suppress(Exception):  # what no longer parses differs by what it holds
            old = _flatten(yaml.safe_load(complete(former)))
    keys = sorted((old.keys() | new.keys()) - NOT_OF_THE_RECIPE)
    return {key: (old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)}


def is_longer(changed: dict[str, tuple[Any, Any]]) -> bool:
    """Return whether two recipes differ in that the second trains longer, and in nothing else.

    Example:
        >>> is_longer({"trainer.max_steps": (300, 600)}), is_longer({"trainer.max_steps": (600, 300)}), is_longer({})
        (True, False, False)
    """
    return bool(changed) and all(key in LENGTHS and _raised(*values) for key, values in changed.items())


def _raised(before: Any, now: Any) -> bool:
    before, now = (-1 if value is None else value for value in (before, now))
    return before != -1 and (now == -1 or now > before)


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, list):
        return {prefix: [_flatten(branch) if isinstance(branch, dict | list) else _present(branch) for branch in tree]}
    if not isinstance(tree, dict):
        return {prefix: _present(tree)}
    return {
        key: value
        for name, branch in tree.items()
        for key, value in _flatten(branch, f"{prefix}.{name}".strip(".")).items()
    }


def _present(value: Any) -> Any:
    return present_path(value) or value if isinstance(value, str) else value
