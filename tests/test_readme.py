"""README names nothing that is not there. Its blocks, commands and links: test_docs.py."""

import re

from places import ROOT


def test_files_that_readme_names_exist():
    for name in re.findall(r"(?:recipes|docs|consistency_reg)/[\w./-]+\.\w+", (ROOT / "README.md").read_text()):
        assert (ROOT / name).exists(), name
