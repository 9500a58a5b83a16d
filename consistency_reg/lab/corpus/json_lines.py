"""Find where a file of JSON lines is not what it should be."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


def first_mistake(files: Iterable[str], column: str, fits: Callable[[Any], bool], expected: str) -> str | None:
    """Return what is wrong with the first bad line of files of JSON lines, with its file and number; None if all fit.

    A file that is one JSON array is only checked for being JSON.

    Args:
        files: their paths; those that are not here are passed over.
        column: the key that holds a document.
        fits: whether a value is a document.
        expected: what a document is, in words.

    Example:
        >>> import tempfile
        >>> place = Path(tempfile.mkdtemp(), "mine.jsonl")
        >>> _ = place.write_text('{"text": "one"}\\n{"text": 2}\\n')
        >>> print(first_mistake([str(place)], "text", lambda value: isinstance(value, str), "a string")[-65:])
        mine.jsonl, line 2: expected a string under the key 'text', got 2
    """
    for file in files:
        path = Path(file)
        if not path.is_file():
            continue
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if number == 1 and line.lstrip().startswith(b"["):
                    if problem := _array(path):
                        return problem
                    break
                if line.strip() and (problem := _line(line, column, fits, expected)):
                    return f"{path}, line {number}: {problem}"
    return None


def _array(path: Path) -> str | None:
    try:
        json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        return f"{path}, line {error.lineno}: {error.msg}"
    except UnicodeDecodeError as error:
        return f"{path}: not UTF-8: {error}"
    return None


def _line(line: bytes, column: str, fits: Callable[[Any], bool], expected: str) -> str | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        return f"not JSON: {error.msg.removesuffix(' at')} at character {error.pos + 1}"
    except UnicodeDecodeError as error:
        return f"not UTF-8: {error.reason} at byte {error.start + 1}"
    if not isinstance(row, dict):
        return f"expected an object with the key {column!r}, got {_short(row)}"
    value = row.get(column)
    return (
        None if value is None or fits(value) else f"expected {expected} under the key {column!r}, got {_short(value)}"
    )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
