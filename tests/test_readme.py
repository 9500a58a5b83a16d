"""Every Python block of README runs as it stands."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_block(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[number], f"README block {number}", "exec"), {})


def test_files_that_readme_names_exist():
    root = README.parent
    for name in re.findall(r"(?:recipes|docs|consistency_reg)/[\w./-]+\.\w+", README.read_text()):
        assert (root / name).exists(), name
