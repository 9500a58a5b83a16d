"""Tables in Markdown: names are shown as they are, and marked tables of a file are renewed."""

import pytest

from consistency_reg.lab.render.markdown import document, markdown, update
from consistency_reg.lab.render.table import Table

HOSTILE = "<img src=x onerror=alert(1)> [a](javascript:b) `c` &lt; | d\n# e"


def test_marked_tables_of_a_markdown_file_are_renewed_and_others_left(tmp_path):
    path = tmp_path / "README.md"
    mark = "<!-- report a.csv: Runs -->\nold\n<!-- end of report -->\n"
    other = "<!-- report b.csv: Runs -->\nkept\n<!-- end of report -->\n"
    path.write_text(f"# Title\n{mark}between\n{other}")
    tables = [Table("Runs", ["run", "SRP"], [["a|b", "44.1"]])]
    assert update(path, "a.csv", tables) == 1
    made = "\n| run | SRP |\n|---|---|\n| a\\|b | 44.1 |\n\n"
    assert path.read_text() == f"# Title\n{mark.replace('old' + chr(10), made)}between\n{other}"
    with pytest.raises(ValueError, match=r"asks for the table 'Runs' of a.csv; there are \['Pairs'\]"):
        update(path, "a.csv", [Table("Pairs", ["run"])])
    with pytest.raises(ValueError, match=r"has no <!-- report c\.csv: TITLE -->"):
        update(path, "c.csv", tables)


def test_a_name_brings_no_html_link_or_cell_into_a_file():
    table = Table(HOSTILE, [HOSTILE, "SRP"], [[HOSTILE, "44.1"]], HOSTILE)
    shown = "&lt;img src=x onerror=alert(1)> \\[a\\](javascript:b) \\`c\\` &amp;lt; \\| d # e"
    assert markdown(table) == f"| {shown} | SRP |\n|---|---|\n| {shown} | 44.1 |\n"
    text = document(HOSTILE, [table])
    assert "<" not in text
    assert [line for line in text.splitlines() if line.startswith("#")] == [f"# {shown}", f"## {shown}"]
