"""Tables on a terminal: no letter is cut off, what has no room is named, and a pipe gets every column."""

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest
from hypothesis import given
from hypothesis import strategies as st
from places import ROOT
from rich.cells import cell_len
from rich.console import Console
from run_folders import write_deployed

from consistency_reg.lab.pricing import rows as prices
from consistency_reg.lab.render.table import Table
from consistency_reg.lab.render.terminal import layout, print_table, print_tables
from consistency_reg.lab.report import pair_runs, read_folder
from consistency_reg.lab.report.findings import Findings
from consistency_reg.lab.report.records import read_csv

NO_ROOM = re.compile(r"no room at \d+ letters for: (.*?) \(a wider")


def printed(table, width=None):
    """The lines of a table on a terminal of some width, or on a pipe."""
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=width is not None, color_system=None)
    print_table(table, console)
    return file.getvalue().splitlines()


def tables_of(name):
    runs = read_csv(ROOT / "recipes" / "results" / f"{name}.csv")
    return Findings(runs, pair_runs(runs)).tables()


@pytest.fixture(scope="module")
def committed():
    return [*tables_of("demo"), *tables_of("gate"), *tables_of("finetune")]


@pytest.fixture(scope="module")
def deployed(tmp_path_factory):
    """Tables of runs with cache-aware routing, also with another cache beside the usual one."""
    folder = write_deployed(tmp_path_factory.mktemp("deployed"))
    for cell in ("off", "srp-0.35"):
        path = folder / f"{cell}-seed0" / "prices.csv"
        rows = prices.read(path)
        prices.write(path, [*rows, *(row | {"cache_ratio": 4.0} for row in rows)])
    runs, _ = read_folder(folder)
    return [one for one in Findings(runs, pair_runs(runs)).tables() if one.title.startswith("As deployed")]


@pytest.mark.parametrize("width", [80, 120, 200])
def test_every_cell_of_a_report_is_whole_or_its_column_is_named(committed, deployed, width):
    assert len(deployed) == 3
    for table in [*committed, *deployed]:
        lines = printed(table, width)
        assert max(map(cell_len, lines)) <= width
        text = "\n".join(lines)
        named = NO_ROOM.search(" ".join(text.split()))
        left_out = named[1].split("; ") if named else []
        words = set(text.split())
        for place, name in enumerate(table.header):
            if name in left_out:
                continue
            for row in table.rows:
                assert set(row[place].split()) <= words, (table.title, name)
        assert set(left_out) < set(table.header)


def test_the_overview_keeps_what_srp_must_stand_beside(committed):
    overview = committed[0]
    text = " ".join(printed(overview, 80))
    for needed in ("112.1", "46.9", "23.7", "48.6", "0.24", "0.23"):
        assert needed in text
    assert "local CV m=16" not in layout(overview, 120).left_out


def test_a_pipe_gets_every_column_and_a_row_in_one_line(committed):
    for table in committed:
        lines = printed(table)
        assert not any("no room at" in line for line in lines)
        for row in table.rows:
            cells = [re.escape(cell) for cell in row if cell]
            assert any(re.search(r"\s+".join(cells), line) for line in lines), row


words = st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=12)
cells = st.lists(words, max_size=3).map(" ".join)


@given(st.data(), st.integers(20, 160))
def test_a_table_of_any_words_fits_any_width(data, width):
    header = data.draw(st.lists(words, min_size=1, max_size=9, unique=True))
    rows = data.draw(st.lists(st.lists(cells, min_size=len(header), max_size=len(header)), max_size=4))
    table = Table("", header, rows, gives_way=tuple(data.draw(st.lists(st.sampled_from(header), unique=True))))
    placed = layout(table, width)
    assert 0 in placed.widths
    assert sum(placed.widths.values()) + 2 * (len(placed.widths) - 1) <= width
    for place, letters in placed.widths.items():
        if place:
            every = [header[place], *(row[place] for row in rows)]
            assert letters >= max(cell_len(word) for cell in every for word in cell.split() or [""])
    assert {header[place] for place in placed.widths} | set(placed.left_out) == set(header)


def test_columns_give_way_in_the_order_that_the_table_asks_for():
    table = Table("", ["run", "a", "b", "c"], [["first", "1.00", "2.00", "3.00"]], gives_way=("b", "c"))
    assert [layout(table, width).left_out for width in (23, 22, 16, 10)] == [[], ["b"], ["b", "c"], ["a", "b", "c"]]


def test_a_long_name_goes_on_in_the_next_line():
    name = "x" * 70
    lines = printed(Table("", ["run", "misses"], [[name, "33.5"]]), 60)
    assert sum(line.count("x") for line in lines) == 70
    assert any("33.5" in line for line in lines)


def test_a_name_moves_no_cursor():
    assert "\x1b" not in "".join(printed(Table("", ["run"], [["\x1b[2Ja"]]), 80))


PROGRAM = """
from consistency_reg.lab.render.table import Table
from consistency_reg.lab.render.terminal import print_tables
header = ["cell", *(f"perplexity of domain {place}" for place in range(20))]
print_tables([Table("Wide", header, [["srp-0.1", *(f"{place}.25" for place in range(20))]])])
"""


@pytest.mark.parametrize("width", [80, 120, 200])
def test_a_real_terminal_says_how_wide_it_is(width):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
    options = {"env": environment | {"TERM": "xterm"}, "cwd": ROOT, "stdin": theirs, "stdout": theirs}
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, timeout=120, **options)
    os.close(theirs)
    text = b""
    while chunk := _read(ours):
        text += chunk
    lines = re.sub(r"\x1b\[[\d;]*m", "", text.decode()).replace("\r", "").splitlines()
    assert max(map(len, lines)) <= width
    shown = re.findall(r"\d+\.25", "".join(lines))
    assert shown == [f"{place}.25" for place in range(len(shown))]
    named = re.findall(r"domain (\d+)(?:;| \()", " ".join(" ".join(lines).split()))
    assert [int(place) for place in named] == list(range(len(shown), 20))
    assert f"no room at {width} letters" in text.decode()


def _read(descriptor):
    try:
        return os.read(descriptor, 65536)
    except OSError:  # how Linux says that the other end is closed
        return b""


def test_tables_stand_one_below_the_other():
    file = io.StringIO()
    tables = [Table("First", ["a"], [["1"]], "a note"), Table("Second", ["b"], [["2"]])]
    print_tables(tables, Console(file=file, color_system=None))
    assert re.sub(r"[^\w ]+", " ", file.getvalue()).split() == ["First", "a", "1", "a", "note", "Second", "b", "2"]
