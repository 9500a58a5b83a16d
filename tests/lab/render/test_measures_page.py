"""The table of measures in the docs is the table in the code."""

import re

from places import ROOT

from consistency_reg.lab.render.measures_page import main, measures_table
from consistency_reg.measures import MEASURES, parse


def test_the_page_has_the_table_of_the_code(tmp_path):
    page = (ROOT / "docs" / "measures.md").read_text()
    copy = tmp_path / "measures.md"
    copy.write_text(page)
    assert main([str(copy)]) == 0
    assert copy.read_text() == page, "make measures"


def test_every_measure_has_a_row_whose_name_reads_back():
    rows = measures_table().rows
    assert [parse(row[0]).measure for row in rows] == list(MEASURES)


def test_every_name_in_the_docs_is_one_that_is_logged():
    """Names in backticks of the pages on tracking that look like measures are in the table."""
    others = {"val/experts", "val/domains", "val/routing/NAME", "val/cache/curve", "val/cache/hit_rates", "val/loss"}
    others |= {"val/bits", "val/perplexity"}
    for page in ("docs/tracking.md", "docs/what_you_log.md", "docs/measures.md"):
        names = re.findall(r"`((?:val|train)/[\w/.]+\w)`", (ROOT / page).read_text())
        unknown = [name for name in names if name not in others and "..." not in name and parse(name) is None]
        assert unknown == [], page
