"""The page and the figures of a report, also as a browser without a network shows them."""

import base64
import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from run_folders import write_demo, write_designs, write_losses, write_run

from consistency_reg.lab.report import main, pair_runs, read_folder
from consistency_reg.lab.report.figures import DRAWN, frontier, hit_rates, published, tradeoff
from consistency_reg.lab.report.findings import Findings
from consistency_reg.lab.report.looks import Looks

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
HOSTILE = "<img src=x onerror=\"document.title='run'\">"
PROBE = """<pre id="probe"></pre><script>
addEventListener("load", () => {
  const wide = [...document.querySelectorAll("body *")].filter(one => one.getBoundingClientRect().right > innerWidth);
  document.getElementById("probe").textContent = JSON.stringify({
    width: innerWidth, scroll: document.documentElement.scrollWidth, wide: wide.map(one => one.tagName),
    images: [...document.images].map(one => one.naturalWidth), tables: document.querySelectorAll("table").length,
    boxes: [...document.querySelectorAll(".wide")].map(one => one.scrollWidth - one.clientWidth),
  });
});</script>"""


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
    assert report("runs", "--out", "out") == 0
    page = Path("out/report.html").read_text()
    parser = PageParser()
    parser.feed(page)
    assert "script" not in parser.tags
    assert "link" not in parser.tags
    assert hostile in parser.text
    pictures = {base64.b64decode(load.removeprefix("data:image/png;base64,")) for load in parser.loads}
    assert pictures == {path.read_bytes() for path in Path("out").glob("*.png")}
    assert {link.removeprefix("#") for link in parser.links} <= set(parser.ids)
    assert not re.search(r"https?://|@import|url\(", page)


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_without_a_network_shows_all_of_the_page_and_runs_nothing_of_a_name(folder):
    write_losses("runs", seeds=(0, 1))
    write_run("runs", "hostile-seed0", name=HOSTILE, weight=0.1)
    assert report("runs", "--out", "out") == 0
    page = Path("out/report.html").read_text()
    Path("probed.html").write_text(page.replace("</body>", f"{PROBE}</body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1280,900", "--enable-logging=stderr"]
    offline = ["--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=5000", "--hide-scrollbars"]
    profile = f"--user-data-dir={folder / 'profile'}"
    command = [CHROMIUM, *options, *offline, profile, "--dump-dom", Path("probed.html").resolve().as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    assert "CONSOLE" not in done.stderr
    assert "<title>Report: runs</title>" in done.stdout
    seen = json.loads(unescape(re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL)[1]))
    assert seen["width"] == seen["scroll"] == 1280
    assert seen["wide"] == []
    assert max(seen["boxes"]) == 0
    assert len(seen["images"]) == len(list(Path("out").glob("*.png"))) >= 7
    assert min(seen["images"]) > 0
    assert seen["tables"] == page.count("<table>") > 8


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
    drawn = set()
    for folder_of_runs in ("losses", "designs"):
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
        assert any(line.get_marker() == "x" for line in figure.axes[0].lines)


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
