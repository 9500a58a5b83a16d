"""The page and the figures of a report, also as a browser without a network shows them and a person uses them."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser import CHROMIUM, DRIVER, browser
from run_folders import write_demo, write_deployed, write_designs, write_losses, write_run

from consistency_reg.lab.report import main, pair_runs, read_folder
from consistency_reg.lab.report.explore import page as page_of
from consistency_reg.lab.report.figures import DRAWN, explored, frontier, hit_rates, published, tradeoff
from consistency_reg.lab.report.findings import Findings
from consistency_reg.lab.report.looks import Looks
from consistency_reg.lab.report.verdict import verdict

HOSTILE = "<img src=x onerror=\"document.title='run'\">"
MOST_BYTES = 5_000_000
needs_browser = pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason="needs chromium and chromedriver")
# The mark of a chart that stands for a run or a cell, marked so that it can be pointed at.
FIND_MARK = """
const marks = [...document.querySelectorAll(`[data-chart="${arguments[0]}"] .mark-symbol path`)];
const found = marks.filter(one => one.__data__.datum?.id === arguments[1]).at(-1);
if (!found) return false;
document.querySelectorAll("[data-found]").forEach(one => one.removeAttribute("data-found"));
found.setAttribute("data-found", "yes");
return true;
"""
SHOWN_GROUPS = """
const marks = [...document.querySelectorAll('[data-chart="tradeoff-0"] .mark-symbol path')];
return [...new Set(marks.map(one => one.__data__.datum.group))].sort();
"""
ROWS = """
const table = document.querySelectorAll("table.data")[0];
return [...table.tBodies[0].rows].filter(row => !row.hidden).map(row => [...row.cells].map(cell => cell.textContent));
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def report(*arguments):
    return main([str(argument) for argument in arguments])


def found(folder):
    runs, _ = read_folder(Path(folder))
    return Findings(runs, pair_runs(runs))


class PageParser(HTMLParser):
    """Collects tags, what they load or lead to, and the text."""

    def __init__(self):
        super().__init__()
        self.tags, self.loads, self.links, self.ids, self.text = [], [], [], [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "srcset", "data")]
        self.links += [value for name, value in attrs if name == "href"]
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_data(self, data):
        self.text += data


def test_the_page_needs_nothing_beside_itself_and_escapes_names(folder):
    write_demo("runs")
    hostile = "<script>alert('&')</script>"
    write_run("runs", "hostile-seed0", name=hostile, command=hostile, weight=0.1)
    findings = found("runs")
    page = page_of(hostile, findings, findings.tables(), verdict(findings))
    assert len(page) < MOST_BYTES
    parser = PageParser()
    parser.feed(page)
    assert parser.tags.count("script") == 3, "data, library and ours"
    assert not {"img", "link", "iframe", "object", "base"} & set(parser.tags)
    assert parser.loads == []
    assert {link.removeprefix("#") for link in parser.links} <= set(parser.ids)
    assert len(parser.ids) == len(set(parser.ids))
    assert "default-src 'none'" in page
    assert hostile in parser.text
    assert "\\u003cscript>alert('&')\\u003c/script>" in page


def test_a_page_says_what_it_is_and_opens_with_the_verdict(folder):
    write_losses("runs")
    findings = found("runs")
    parser = PageParser()
    parser.feed(page_of("runs", findings, findings.tables(), verdict(findings)).split("<nav>")[0])
    assert "runs: LocalConsistency, ReMoE, Sticky against no term" in parser.text
    assert "13 cells · 39 runs · 3 seeds · experts 32/4 · 1.23M tokens each · 8 domains of text" in parser.text
    assert "srp-0.2 has 52.0% fewer LRU misses at 25% of the experts for +0.3% perplexity against off" in parser.text
    assert "Next: " in parser.text


def test_charts_have_every_cell_and_run(folder):
    write_losses("losses", seeds=(0, 1))
    write_designs("designs", {"Baseline": 0.4, "NoLB": 0.5, "OverLB": 0.3, "1ShrExp": 0.38}, seeds=(0,))
    write_deployed("deployed")
    names = set()
    for runs in ("losses", "designs", "deployed"):
        findings = found(runs)
        figures = {figure.name: figure for figure in explored(findings)}
        names |= set(figures)
        cells = {run.cell for run in findings.runs}
        for figure in ("tradeoff", "balance", "layers", *(["hit_rates"] if runs == "losses" else [])):
            for chart in figures[figure].charts:
                assert cells_of(chart.spec) >= cells, figure
        compared = {pair.run.cell for pair in findings.pairs}
        for figure in ("frontier", *(["cost"] if runs == "losses" else [])):
            for chart in figures[figure].charts:
                assert cells_of(chart.spec) >= compared, figure
    assert names == set(DRAWN)


def cells_of(spec):
    data = [part["data"] for part in (spec, *spec["layer"]) if "data" in part]
    return {value["cell"] for one in data for value in one["values"] if "cell" in value}


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A report on three losses, one of whose runs has a hostile name."""
    runs = write_losses(tmp_path_factory.mktemp("page") / "runs", seeds=(0, 1))
    write_run(runs, "hostile-seed0", name=HOSTILE, weight=0.1)
    assert report(runs) == 0
    return runs / "report" / "report.html"


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1400, 500])
def test_a_browser_without_a_network_shows_all_of_the_page_and_runs_nothing_of_a_name(window, page, width, dark):
    window.look(width, dark=dark)
    window.visit(page)
    assert window.messages() == []
    assert window.run("return document.title").endswith("LocalConsistency, ReMoE, Sticky against no term")
    assert window.run("return [innerWidth, document.documentElement.scrollWidth]") == [width, width]
    drawn, charts, empty = window.run(
        "const all = [...document.querySelectorAll('.chart')];"
        "return [document.querySelectorAll('.chart svg').length, all.length,"
        "all.filter(one => !one.querySelector('path[d]')).length]"
    )
    assert drawn == charts >= 11
    assert empty == 0
    assert window.run("return [...document.querySelectorAll('.chart svg')].every(one => one.clientWidth <= innerWidth)")
    paper, ink = window.run(
        "const axis = document.querySelector('.chart .role-axis-label text');"
        "return [getComputedStyle(document.body).backgroundColor, getComputedStyle(axis).fill]"
    )
    assert (brightness(paper) < 60, brightness(ink) > 200) == (dark, dark)


def brightness(colour):
    return max(map(int, re.findall(r"\d+", colour)[:3]))


@needs_browser
def test_a_point_tells_its_run_and_opens_it(window, page):
    window.look(1400)
    window.visit(page)
    assert window.run(FIND_MARK, "tradeoff-0", "run:srp-0.2-seed1")
    window.point("[data-found]")
    told = window.wait_for("return document.querySelector('#vg-tooltip-element.visible')?.textContent")
    for said in ("srp-0.2-seed1", "seed", "LocalConsistency 0.2", "perplexity72.22", "static SRP", "global CV"):
        assert said in told
    window.click("[data-found]")
    detail = window.wait_for("const one = document.querySelector('#detail:not([hidden])'); return one?.textContent")
    for said in ("srp-0.2-seed1", "consistency-reg fit --config recipes/quickstart.yaml", "off-seed1", "overlap (%)"):
        assert said in detail
    assert window.run("return document.querySelectorAll('tr.picked').length") >= 2
    assert window.run("return decodeURIComponent(location.hash)") == "#run:srp-0.2-seed1"
    window.tell("Input.dispatchKeyEvent", {"type": "keyDown", "key": "Escape"})
    window.wait_for("return document.querySelector('#detail').hidden")

    assert window.run(FIND_MARK, "frontier-0", "cell:remoe-0.04")
    window.click("[data-found]")
    window.wait_for("return document.querySelector('#detail h2')?.textContent === 'remoe-0.04'")
    window.click("#detail li button", 1)
    window.wait_for("return document.querySelector('#detail h2').textContent === 'remoe-0.04-seed1'")
    window.click("#detail .close")
    window.click("table.data tbody button.open")
    assert window.wait_for("return !document.querySelector('#detail').hidden")


@needs_browser
def test_tables_sort_and_filter_and_the_legend_hides_a_loss_everywhere(window, page):
    window.look(1400)
    window.visit(page)
    header = window.run(
        "return [...document.querySelectorAll('table.data')[0].tHead.rows[0].cells].map(one => one.textContent)"
    )
    place = header.index("perplexity")
    before = [float(row[place]) for row in window.run(ROWS)]
    for order in (False, True):
        window.click("table.data thead button", place)
        assert [float(row[place]) for row in window.run(ROWS)] == sorted(before, reverse=order)

    assert "Sticky" in window.run(SHOWN_GROUPS)
    window.click('.chip[data-group="Sticky"]')
    window.wait_for(f"return !(() => {{{SHOWN_GROUPS}}})().includes('Sticky')")
    assert not any(row[0].startswith("sticky") for row in window.run(ROWS))
    window.click('.chip[data-group="Sticky"]')
    window.type("#wanted", "REMOE")
    window.wait_for(f"return (() => {{{SHOWN_GROUPS}}})().join() === 'ReMoE'")
    assert {row[0].split("-")[0] for row in window.run(ROWS)} == {"remoe"}
    window.type(".tools input", "0.16")
    window.wait_for(f"return (() => {{{ROWS}}})().length === 1")
    assert window.run("return document.querySelector('.tools span').textContent").startswith("1 of ")
    assert window.messages() == []


def test_figures_tell_terms_by_colour_and_what_they_share_by_shape(folder):
    write_demo("runs")
    write_run("runs", "remoe-seed0", weight=0.1, loss="ReMoELoss", hits=0.6, perplexity=72.0)
    findings = found("runs")
    figure = tradeoff.draw(findings, Looks.of(findings.runs, findings.pairs))
    for axes in figure.axes:
        points = [line for line in axes.lines if len(line.get_xdata()) == 1]
        looks = {(line.get_color(), line.get_marker(), line.get_markerfacecolor() == "white") for line in points}
        assert len(points) == len(looks) == 5
        assert len({colour for colour, _, hollow in looks if not hollow}) == 2
        assert len({shape for _, shape, _ in looks}) == 2
    misses = {round(float(line.get_xdata()[0]), 6) for line in figure.axes[0].lines if len(line.get_xdata()) == 1}
    assert misses == {52.0, 32.0, 34.0, 40.0}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "LocalConsistency",
        "ReMoE",
        "no term",
        "32/4 experts/active",
        "31/3 + 1 shared experts/active",
        "baseline to its pair",
    ]


def test_every_figure_of_what_was_measured_is_drawn_with_its_axes_named(folder):
    write_losses("losses", seeds=(0,))
    write_designs("designs", {"Baseline": 0.4, "NoLB": 0.5, "OverLB": 0.3, "1ShrExp": 0.38}, seeds=(0,))
    write_deployed("deployed")
    drawn = set()
    for folder_of_runs in ("losses", "designs", "deployed"):
        findings = found(folder_of_runs)
        looks = Looks.of(findings.runs, findings.pairs)
        for name, module in DRAWN.items():
            figure = module.draw(findings, looks)
            if figure is not None:
                drawn.add(name)
                assert all(axes.get_xlabel() or axes.get_ylabel() for axes in figure.axes), name
    assert drawn == set(DRAWN)


def test_seeds_that_agree_exactly_are_drawn(folder):
    seeds = (0, 1, 2)
    for seed in seeds:
        write_run("cells", f"off-seed{seed}", seed=seed, hits=0.41)
        for cell in range(8):  # the mean of three equal floats lies beside them for some
            options = {"weight": 0.1 + cell, "perplexity": 70.1 + cell / 7, "hits": 0.41 + cell / 20}
            write_run("cells", f"on-{cell}-seed{seed}", seed=seed, **options)
    for seed in seeds:
        for place, design in enumerate(("Baseline", "NoLB", "OverLB", "1ShrExp", "2ShrExp", "ActMore", "ActFewer")):
            metrics, labels = {"val/srp/m16": 0.41 + place / 11}, {"design": design}
            write_run("designs", f"{design}-seed{seed}", seed=seed, metrics=metrics, labels=labels)
    for runs, modules in {"cells": (frontier, hit_rates), "designs": (published,)}.items():
        findings = found(runs)
        looks = Looks.of(findings.runs, findings.pairs)
        assert all(module.draw(findings, looks) is not None for module in modules)


def test_a_run_that_collapsed_is_crossed_out(folder):
    write_run("runs", "a-seed0")
    write_run("runs", "b-seed0", weight=1.0, hits=0.9, metrics={"val/balance/min_share": 0.05})
    findings = found("runs")
    looks = Looks.of(findings.runs, findings.pairs)
    for module, label in ((tradeoff, "an expert below 0.1 of its fair share"), (frontier, "left out")):
        figure = module.draw(findings, looks)
        assert label in [text.get_text() for text in figure.legends[0].get_texts()]
        crosses = [line for line in figure.axes[0].lines if line.get_marker() == "x"]
        shapes = [line for line in figure.axes[0].lines if line.get_marker() not in ("x", "None", "|", "_", "")]
        assert crosses
        assert max(line.get_zorder() for line in crosses) < max(line.get_zorder() for line in shapes)


def test_files_are_the_same_bytes_for_the_same_runs_and_pictures_of_earlier_ones_go(folder):
    write_demo("runs")
    assert report("runs", "--out", "a", "--pictures", "docs") == 0
    Path("b").mkdir()
    Path("b/published.png").touch()
    assert report("runs", "--out", "b") == 0
    assert {path.name for path in Path("a").iterdir()} == {path.name for path in Path("b").iterdir()}
    for path in Path("a").iterdir():
        assert path.read_bytes() == Path("b", path.name).read_bytes()
    assert {path.name for path in Path("docs").iterdir()} == {path.name for path in Path("a").glob("*.png")}
