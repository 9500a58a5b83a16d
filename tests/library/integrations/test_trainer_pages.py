"""Every Python block of the trainers' pages runs as it stands, those of one page in turn."""

import re

import pytest
from places import ROOT

FOLDER = ROOT / "docs" / "trainers"
PAGES = {path.stem: path.read_text() for path in sorted(FOLDER.glob("*.md"))}
BLOCKS = {name: re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) for name, text in PAGES.items()}


@pytest.mark.parametrize("page", [name for name, blocks in BLOCKS.items() if blocks])
def test_page(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for number, block in enumerate(BLOCKS[page]):
        exec(compile(block, f"{page}.md block {number}", "exec"), namespace)


def test_the_index_names_every_page():
    assert set(re.findall(r"\]\((\w+)\.md\)", PAGES["README"])) == set(PAGES) - {"README"}
