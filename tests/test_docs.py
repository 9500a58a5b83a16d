"""README and docs: every Python block runs, the command line takes every command, every link leads somewhere."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest
from places import ROOT

from consistency_reg.lab.arguments.fit import recipe_words
from consistency_reg.lab.cli import COMMANDS

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Pages about other trainers have tests of their own, with the models and data that they need.
RUN_HERE = ("README.md", "choosing.md", "deploying.md", "glossary.md", "index.md", "tracking.md", "what_you_log.md")


def found(pattern, pages=PAGES):
    """Return (page, match) of every match."""
    flags = re.DOTALL | re.MULTILINE
    return [(page, match) for page in pages for match in re.findall(pattern, page.read_text(), flags)]


def commands():
    """Return each command with arguments, in a block or in backticks, without what is said beside it."""
    lines = found(r"^(consistency-reg [^\n`]+)") + found(r"`(consistency-reg [^`]+)`")
    return [(page, " ".join(line.split("  ")[0].split("#")[0].split())) for page, line in lines]


def ids(value):
    return value.name if isinstance(value, Path) else ""


BLOCKS = found(r"^```python\n(.*?)^```", [page for page in PAGES if page.name in RUN_HERE])


@pytest.mark.parametrize(("page", "code"), BLOCKS, ids=ids)
def test_python_block(page, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, page.name, "exec"), {"__name__": "block"})


@pytest.mark.parametrize(("page", "line"), commands(), ids=ids)
def test_command(page, line, tmp_path, monkeypatch):
    _, name, *arguments = shlex.split(line)
    assert name in COMMANDS, line
    monkeypatch.chdir(tmp_path)
    for word in arguments:
        if re.fullmatch(r"[\w-]+\.(jsonl|txt)", word):  # the reader's own text
            Path(word).touch()
        if re.match(r"recipes/[\w./]+\.(yaml|csv)$", word) and "NAME" not in word:
            assert (ROOT / word).exists(), word
    if name == "fit":
        recipe_words(arguments)
    elif arguments:
        import_module(f"consistency_reg.lab.arguments.{name}").parser().parse_args(arguments)


@pytest.mark.parametrize(("page", "target"), found(r"\]\(([^)#]+)\)"), ids=ids)
def test_link(page, target):
    assert target.startswith("http") or (page.parent / target).exists(), target
