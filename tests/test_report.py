"""Reports: what is read, what is refused, what is paired with what, and what ends in the files."""

import base64
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from run_folders import DOMAINS, result, write_demo, write_run

from consistency_reg.report import main, pair_runs, read_folder, read_run
from consistency_reg.report.plots import tradeoff
from consistency_reg.report.records import read_csv, to_frame
from consistency_reg.report.runs import architecture, consistency_term
from consistency_reg.report.tables import pair_table, run_tables


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def report(*arguments):
    return main([str(argument) for argument in arguments])


def test_a_folder_of_cells_becomes_table_csv_json_picture_and_page(folder, capsys):
    write_demo("runs/demo")
    assert report("runs/demo") == 0
    output = capsys.readouterr().out
    for name in ("none-off-seed0", "none-on-seed0", "shared-off-seed0", "shared-on-seed0"):
        assert output.count(name) >= 4
    for header in (
        *DOMAINS,
        "tokens/s",
        "SRP m=64",
        "rho_hat",
        "static SRP",
        "at 2K",
        "local CV",
        "max/mean",
        "overlap",
    ):
        assert header in output
    assert "runs/none-on-seed0/wandb/offline-run-1" in output
    files = Path("runs/demo/report")
    frame = pd.read_csv(files / "table.csv")
    assert list(frame["val/cache/lru_25pct"]) == [0.48, 0.68, 0.48, 0.66]
    assert list(frame["architecture"]) == ["32/4", "32/4", "31/3 + 1 shared", "31/3 + 1 shared"]
    records = json.loads((files / "table.json").read_text())
    assert records[0]["metrics"]["val/srp/m16/layer_00"] == pytest.approx(0.54)
    assert (files / "tradeoff.png").read_bytes().startswith(b"\x89PNG")
    assert report("runs/demo") == 0, "its own folder is no run"


def test_a_run_stands_beside_the_run_that_differs_in_the_term_alone(folder):
    write_demo("runs", seeds=(0, 1))
    write_run("runs", "other-balance-seed0", weight=0.3, perplexity=60.0)
    content = json.loads(Path("runs/other-balance-seed0/result.json").read_text())
    content["config"]["model"]["balance_weight"] = 0.1
    Path("runs/other-balance-seed0/result.json").write_text(json.dumps(content))
    runs, _ = read_folder(Path("runs"))
    pairs = pair_runs(runs)
    assert [(pair.run.name, pair.baseline.name) for pair in pairs] == [
        ("none-on-seed0", "none-off-seed0"),
        ("none-on-seed1", "none-off-seed1"),
        ("shared-on-seed0", "shared-off-seed0"),
        ("shared-on-seed1", "shared-off-seed1"),
    ]
    first = pairs[0]
    assert first.misses_change == pytest.approx(0.32 / 0.52 - 1)
    assert first.perplexity_change == pytest.approx(0.006)
    assert first.srp_change == pytest.approx(0.1)
    assert first.max_mean_ratio == pytest.approx(1.0)
    assert first.smallest_share == pytest.approx(0.4)
    table = pair_table(pairs)
    assert [row[2] for row in table.rows] == ["0", "1", "mean of 2", "lowest", "highest"] * 2
    assert table.rows[0][3:5] == ["-38.5%", "+0.6%"]


def test_a_named_baseline_is_compared_seed_by_seed(folder):
    write_demo("runs", seeds=(0, 1))
    runs, _ = read_folder(Path("runs"))
    pairs = pair_runs(runs, "none-off")
    assert len(pairs) == 6
    assert all(pair.run.seed == pair.baseline.seed and pair.baseline.cell == "none-off" for pair in pairs)
    assert {pair.run.seed for pair in pair_runs(runs, "none-off-seed1")} == {1}
    with pytest.raises(ValueError, match="--baseline must name a run or a cell, got 'nothing'; there are none-off"):
        pair_runs(runs, "nothing")


def test_runs_of_different_data_are_refused_with_what_differs(folder):
    write_run("runs", "a")
    corpus = {**dict.fromkeys(DOMAINS, "0" * 64), **result("x")["corpus"], "cpp": "f" * 64}
    write_run("runs", "b", corpus=corpus)
    with pytest.raises(
        ValueError, match=r"a and b are of different data.*corpus of cpp cpp000000000.* and ffffffffffff"
    ):
        report("runs/a", "runs/b")
    write_run("runs", "c", data={"validation_tokens": 2000})
    with pytest.raises(ValueError, match="validation_tokens 1000 and 2000"):
        report("runs/a", "runs/c")
    write_run("runs", "d", corpus={key: value for key, value in corpus.items() if key != "cpp"})
    with pytest.raises(ValueError, match=r"corpus of cpp .* and none"):
        report("runs/a", "runs/d")


def test_what_is_no_run_is_refused_and_what_is_not_finished_is_said(folder, capsys):
    Path("empty").mkdir()
    with pytest.raises(ValueError, match=r"empty is no run: it has no result\.json"):
        report("empty")
    with pytest.raises(ValueError, match="nowhere does not exist"):
        report("nowhere")
    broken = write_run("broken", "run")
    (broken / "result.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken/run/result\.json is no result of a run"):
        report(broken)
    (broken / "result.json").write_text(json.dumps({"name": "run"}))
    with pytest.raises(ValueError, match="'config' is missing"):
        report(broken)
    write_run("runs", "a")
    Path("runs/half").mkdir()
    with pytest.raises(ValueError, match="runs/half is no run"):
        report("runs/half")
    Path("runs/half/config.yaml").touch()
    with pytest.raises(ValueError, match="runs/half holds a run that is not finished"):
        report("runs/half")
    assert report("runs") == 0
    assert "runs: left out, not finished: half" in capsys.readouterr().err
    Path("some.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"some\.csv is no CSV of runs: 'name' is missing"):
        report("some.csv")


def test_runs_of_one_name_are_told_apart_and_a_run_given_twice_is_refused(folder):
    write_run("one", "baseline")
    write_run("two", "baseline")
    assert report("one/baseline", "two/baseline", "--out", "out") == 0
    assert list(pd.read_csv("out/table.csv")["name"]) == ["one/baseline", "two/baseline"]
    with pytest.raises(ValueError, match="more than one one/baseline"):
        report("one/baseline", "one/baseline")


def test_a_committed_csv_gives_the_same_report_as_the_folders(folder, capsys):
    write_demo("runs/demo")
    assert report("runs/demo", "--append-csv", "recipes/results/demo.csv", "--out", "a") == 0
    assert "4 rows added, 0 were there" in capsys.readouterr().out
    assert report("runs/demo", "--append-csv", "recipes/results/demo.csv", "--out", "a") == 0
    assert "0 rows added, 4 were there" in capsys.readouterr().out
    write_run("runs/demo", "none-remoe-seed0", weight=0.1, loss="RemoeLoss", metrics={"val/new": 1.5})
    assert report("runs/demo/none-remoe-seed0", "--append-csv", "recipes/results/demo.csv", "--out", "a") == 0
    frame = pd.read_csv("recipes/results/demo.csv")
    assert len(frame) == 5
    for column in ("command", "seed", "git_commit", "versions", "wall_time_s", "val/ppl/cpp"):
        assert frame[column].notna().all()
    assert not [column for column in frame.columns if "layer_" in column or column.endswith("m16/cpp")]

    from_folders, _ = read_folder(Path("runs/demo"))
    from_csv = read_csv(Path("recipes/results/demo.csv"))
    assert {run.name: run.pair for run in from_csv} == {run.name: run.pair for run in from_folders}
    ordered = sorted(from_csv, key=lambda run: run.name)
    assert run_tables(ordered) == run_tables(sorted(from_folders, key=lambda run: run.name))
    assert report("recipes/results/demo.csv", "--out", "b") == 0
    assert Path("b/table.csv").read_text() == Path("recipes/results/demo.csv").read_text()
    write_run("other", "x", data={"vocab_size": 99})
    with pytest.raises(ValueError, match="vocab_size none and 99"):
        report("other/x", "--append-csv", "recipes/results/demo.csv")


def test_metrics_that_are_missing_or_nan_leave_gaps(folder):
    write_run("runs", "a-seed0", metrics={"val/srp/m16": None, "val/overlap": float("nan")})
    write_run("runs", "b-seed0", weight=0.3, metrics={"val/cache/lru_25pct": None})
    assert report("runs", "--out", "out") == 0
    assert json.loads(Path("out/table.json").read_text())[0]["metrics"]["val/overlap"] is None
    assert pair_table(pair_runs(read_folder(Path("runs"))[0])).rows[0][3] == ""
    path = write_run("runs", "c")
    content = json.loads((path / "result.json").read_text())
    del content["metrics"]["val/ppl"]
    (path / "result.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="'val/ppl' is missing"):
        read_run(path)


def test_a_collapsed_run_is_marked_everywhere(folder, capsys):
    write_run("runs", "a-seed0")
    write_run("runs", "b-seed0", weight=1.0, hits=0.9, metrics={"val/balance/min_share": 0.05})
    runs, _ = read_folder(Path("runs"))
    assert [run.collapsed for run in runs] == [False, True]
    assert report("runs", "--out", "out") == 0
    assert "b-seed0 (collapsed)" in capsys.readouterr().out
    assert '<tr class="collapsed"><td>b-seed0 (collapsed)' in Path("out/report.html").read_text()
    labels = [text.get_text() for text in tradeoff(runs, pair_runs(runs)).legends[0].get_texts()]
    assert "an expert below 0.1 of its fair share" in labels


class PageParser(HTMLParser):
    """Collects tags, what they load, and the text."""

    def __init__(self):
        super().__init__()
        self.tags, self.loads, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "srcset", "data")]

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
    assert [load[:22] for load in parser.loads] == ["data:image/png;base64,"]
    assert base64.b64decode(parser.loads[0][22:]) == Path("out/tradeoff.png").read_bytes()
    assert not re.search(r"https?://|@import|url\(", page)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_without_a_network_shows_the_page_and_runs_nothing_of_a_name(folder):
    write_demo("runs")
    write_run("runs", "hostile-seed0", name="<img src=x onerror=\"document.title='run'\">", weight=0.1)
    assert report("runs", "--out", "out") == 0
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000"]
    offline = "--host-resolver-rules=MAP * ~NOTFOUND"
    address = Path("out/report.html").resolve().as_uri()
    command = ["chromium", *options, offline, f"--user-data-dir={folder / 'profile'}", "--dump-dom", address]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert "<title>Report: runs</title>" in dom
    assert dom.count("<img") == 1
    assert "shared-on-seed0" in dom


def test_the_figure_tells_architectures_by_colour_and_terms_by_shape(folder):
    write_demo("runs")
    write_run("runs", "remoe-seed0", weight=0.1, loss="RemoeLoss", hits=0.6, perplexity=72.0)
    runs, _ = read_folder(Path("runs"))
    figure = tradeoff(runs, pair_runs(runs))
    for axes in figure.axes:
        points = [line for line in axes.lines if len(line.get_xdata()) == 1]
        looks = {(line.get_color(), line.get_marker(), line.get_markerfacecolor() == "white") for line in points}
        assert len(points) == 5
        assert len(looks) == 5
        assert len({colour for colour, _, _ in looks}) == 2
        assert {shape for _, shape, hollow in looks if hollow} == {"o"}
    assert [axes.get_xlabel().splitlines()[0] for axes in figure.axes] == [
        "LRU misses at cache = 25% of the experts (% of expert accesses)",
        "SRP, segments of 16 tokens (%)",
    ]
    misses = {round(float(line.get_xdata()[0]), 6) for line in figure.axes[0].lines if len(line.get_xdata()) == 1}
    assert misses == {52.0, 32.0, 34.0, 40.0}
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == [
        "32/4 (experts/active)",
        "31/3 + 1 shared (experts/active)",
        "no consistency term",
        "LocalConsistency",
        "Remoe",
        "baseline to its pair",
    ]


def test_the_picture_is_the_same_bytes_for_the_same_runs(folder):
    write_demo("runs")
    assert report("runs", "--out", "a") == 0
    assert report("runs", "--out", "b") == 0
    for name in ("tradeoff.png", "table.csv", "table.json", "report.html"):
        assert Path("a", name).read_bytes() == Path("b", name).read_bytes()


def test_a_name_with_markup_is_printed_as_it_is(folder, capsys):
    write_run("runs", "x-seed0", name="[red]x[/red]-seed0")
    assert report("runs", "--out", "out") == 0
    assert "[red]x[/red]-seed0" in capsys.readouterr().out


def test_a_recipe_that_is_not_ours_still_has_a_name_and_no_term():
    assert architecture({"model": {"model": {"class_path": "some.Mixtral", "init_args": {}}}}) == "Mixtral"
    assert architecture({}) == "model"
    assert consistency_term({}) == ("none", 0.0)
    assert consistency_term({"consistency": {"loss": None, "weight": 0.3}}) == ("LocalConsistency", 0.3)
    assert consistency_term({"consistency": {"weight": 0}}) == ("none", 0.0)


def test_a_frame_has_a_row_a_run(folder):
    write_demo("runs", seeds=(0, 1))
    assert to_frame(read_folder(Path("runs"))[0]).shape[0] == 8
