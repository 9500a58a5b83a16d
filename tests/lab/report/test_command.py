"""Reports: what is read, what is refused, what is paired with what, and what ends in the files."""

import inspect
import json
import math
import re
from pathlib import Path

import pandas as pd
import pytest
import wandb
from lightning.pytorch import Trainer
from PIL import Image
from places import ROOT
from run_folders import DOMAINS, result, write_demo, write_losses, write_run
from wandb_file import read_run as read_wandb_run

from consistency_reg.lab.recipe import architecture, consistency_term, pair_digest
from consistency_reg.lab.render.markdown import MARKED, update
from consistency_reg.lab.report import command, main, pair_runs, read_folder, read_run
from consistency_reg.lab.report.command import gather
from consistency_reg.lab.report.findings import Findings
from consistency_reg.lab.report.measured import HITS, MAX_MEAN, MIN_SHARE, PERPLEXITY, SRP
from consistency_reg.lab.report.records import fingerprint, read_csv, to_frame
from consistency_reg.lab.report.runs import loss_labels
from consistency_reg.lab.report.tables import pair_table


@pytest.fixture
def drawing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def folder(drawing, monkeypatch):
    """Where nothing is drawn: most tests are not about figures."""
    monkeypatch.setattr(command, "pictures", lambda *_, **__: {})
    return drawing


def report(*arguments):
    return main([str(argument) for argument in arguments])


def test_a_folder_of_cells_becomes_table_csv_json_pictures_and_page(drawing, capsys):
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
        "at 2 x K",
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
    assert records[0]["metrics"]["val/srp/m16/layer_00"] == pytest.approx(0.52)
    for name in ("frontier", "tradeoff", "balance", "layers", "hit_rates", "effects"):
        assert (files / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert report("runs/demo") == 0, "its own folder is no run"


def test_a_report_is_a_run_of_wandb_with_its_files_as_an_artifact(drawing, monkeypatch):
    wandb.init(project="moe", mode="offline", dir=drawing).finish()  # wandb's process stays in the folder it began in
    (drawing / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    write_demo("runs/demo")
    assert report("runs/demo", "--wandb", "moe") == 0
    run = read_wandb_run(Path("runs/demo/report"))
    logged = {name for row in run.history for name in row}
    assert {"report/Overview", "report/frontier", "report/page"} <= logged
    ((_, name, files),) = [one for one in run.artifacts if one[0] == "report"]
    assert name == "report-demo"
    assert {"report.html", "tables.md", "table.csv", "table.json", "frontier.png"} <= set(files)


def test_a_diverged_run_does_not_keep_the_others_from_being_reported(drawing, capsys):
    write_demo("runs")
    course = [(99, 71.0, 0.4), (199, math.inf, 0.1), (399, math.inf, 0.1)]
    write_run("runs", "none-diverged-seed0", weight=0.3, perplexity=math.inf, course=course)
    assert report("runs") == 0
    assert "none-diverged" in capsys.readouterr().out
    shown = {run["name"]: run for run in json.loads(Path("runs/report/table.json").read_text())}
    assert shown["none-diverged-seed0"]["metrics"]["val/ppl"] is None
    assert shown["none-on-seed0"]["metrics"]["val/ppl"] > 0


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
    assert first.compared(HITS) == pytest.approx(0.32 / 0.52 - 1)
    assert first.compared(PERPLEXITY) == pytest.approx(0.006)
    assert first.compared(SRP) == pytest.approx(0.1)
    assert first.compared(MAX_MEAN) == pytest.approx(1.0)
    assert first.compared(MIN_SHARE) == pytest.approx(0.4)
    assert pair_table(pairs).rows[0][:4] == ["none-on-seed0", "none-off-seed0", "-38.5%", "+0.6%"]


def test_a_pair_agrees_in_what_the_trainer_changes_of_a_run():
    usual = {"max_steps": 400, "accumulate_grad_batches": 1, "devices": 1}
    watching = [{"class_path": "lightning.pytorch.callbacks.LearningRateMonitor", "init_args": {}}]
    arguments = inspect.signature(Trainer.__init__).parameters
    lightnings = {name: argument.default for name, argument in arguments.items() if name != "self"}
    alike = [lightnings | usual, usual | {"callbacks": watching, "logger": False}]
    averaging = {"class_path": "lightning.pytorch.callbacks.StochasticWeightAveraging", "init_args": {"swa_lrs": 0.01}}
    others = [
        {"limit_train_batches": 10},
        {"num_nodes": 2},
        {"gradient_clip_algorithm": "value"},
        {"overfit_batches": 1},
        {"callbacks": [*watching, averaging]},
    ]
    digest = pair_digest({"trainer": usual})
    assert {pair_digest({"trainer": same}) for same in alike} == {digest}
    assert len({pair_digest({"trainer": usual | other}) for other in others} - {digest}) == len(others)


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
    write_run("runs", "half", trainer={"limit_val_batches": 0.5})
    with pytest.raises(ValueError, match=r"limit_val_batches none and 0\.5"):
        report("runs/a", "runs/half")
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
    with pytest.raises(ValueError, match="'steps' is missing"):
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
    write_run("runs/demo", "none-remoe-seed0", weight=0.1, loss="ReMoELoss", metrics={"val/new": 1.5})
    assert report("runs/demo/none-remoe-seed0", "--append-csv", "recipes/results/demo.csv", "--out", "a") == 0
    frame = pd.read_csv("recipes/results/demo.csv")
    assert len(frame) == 5
    for column in ("command", "seed", "git_commit", "versions", "wall_time_s", "val/ppl/cpp"):
        assert frame[column].notna().all()
    assert not [column for column in frame.columns if column.endswith("m16/cpp")]
    assert "val/srp/m16/layer_02" in frame.columns

    from_folders, _ = read_folder(Path("runs/demo"))
    from_csv = read_csv(Path("recipes/results/demo.csv"))
    assert {run.name: run.pair for run in from_csv} == {run.name: run.pair for run in from_folders}
    assert report("recipes/results/demo.csv", "--out", "b") == 0
    assert Path("b/table.csv").read_text() == Path("recipes/results/demo.csv").read_text()
    write_run("other", "x", data={"vocab_size": 99})
    with pytest.raises(ValueError, match="vocab_size none and 99"):
        report("other/x", "--append-csv", "recipes/results/demo.csv")


@pytest.mark.parametrize(
    ("column", "text", "message"),
    [
        ("seed", "first", "row 2 (b-seed0): seed must be a whole number, got 'first'"),
        ("steps", "", "row 2 (b-seed0): steps must be a whole number, got ''"),
        ("weight", "0,3", "row 2 (b-seed0): weight must be a number, got '0,3'"),
        ("versions", "torch 2", "row 2 (b-seed0): versions must be a JSON object, got 'torch 2'"),
        ("labels", "[1]", "row 2 (b-seed0): labels must be a JSON object, got '[1]'"),
        ("data", '{"corpus": 5}', "row 2 (b-seed0): data must be a JSON object whose corpus maps domains to hashes"),
        ("curve", '{"tokens": 5}', "row 2 (b-seed0): curve must be a JSON object of lists of numbers"),
        ("curve", '{"tokens": [5], "val/ppl": []}', "row 2 (b-seed0): curve must be a JSON object of lists of numbers"),
        ("val/srp/m16", "44%", "row 2 (b-seed0): val/srp/m16 must be a number, got '44%'"),
    ],
)
def test_a_cell_that_was_edited_by_hand_is_named(folder, column, text, message):
    for name in ("a-seed0", "b-seed0"):
        write_run("runs", name)
    assert report("runs", "--append-csv", "rows.csv", "--out", "a") == 0
    frame = pd.read_csv("rows.csv", dtype=str, keep_default_na=False)
    frame.loc[1, column] = text
    frame.to_csv("rows.csv", index=False)
    with pytest.raises(ValueError, match=re.escape(f"rows.csv is no CSV of runs: {message}")):
        report("rows.csv", "--out", "b")
    assert not Path("b").exists()


def test_numbers_as_a_spreadsheet_writes_them_and_rows_without_labels_are_read(folder):
    write_run("runs", "a-seed0")
    assert report("runs", "--append-csv", "rows.csv", "--out", "a") == 0
    frame = pd.read_csv("rows.csv", dtype=str, keep_default_na=False)
    frame.loc[0, ["tokens", "seed", "labels"]] = ["1.2288E+06", "0.0", ""]
    frame.to_csv("rows.csv", index=False)
    (run,) = read_csv(Path("rows.csv"))
    assert (run.tokens, run.seed, run.labels) == (1_228_800, 0, {})


def test_what_cannot_be_written_is_said_before_the_work(folder, monkeypatch):
    write_run("runs", "a-seed0")
    Path("file").touch()
    monkeypatch.setattr(command, "gather", lambda sources: pytest.fail("has begun to work"))
    for arguments, option in (
        (["--out", "file"], "--out"),
        (["--out", "file/below"], "--out"),
        (["--out", "out", "--pictures", "file"], "--pictures"),
        (["--out", "out", "--append-csv", "file/rows.csv"], "--append-csv"),
        (["--out", "out", "--update", "README.md"], "--update"),
    ):
        with pytest.raises(ValueError, match=f"{option} must"):
            report("runs", *arguments)
    assert not Path("out").exists()


def test_metrics_that_are_missing_or_nan_leave_gaps(folder):
    write_run("runs", "a-seed0", metrics={"val/srp/m16": None, "val/overlap": float("nan")})
    write_run("runs", "b-seed0", weight=0.3, metrics={"val/cache/lru_25pct": None})
    assert report("runs", "--out", "out") == 0
    assert json.loads(Path("out/table.json").read_text())[0]["metrics"]["val/overlap"] is None
    assert pair_table(pair_runs(read_folder(Path("runs"))[0])).rows[0][2] == ""
    path = write_run("runs", "c")
    content = json.loads((path / "result.json").read_text())
    del content["metrics"]["val/ppl"]
    (path / "result.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="'val/ppl' is missing"):
        read_run(path)


def test_runs_whose_documents_are_all_shorter_than_16_tokens_are_compared_without_srp(folder):
    of_segments = ("val/srp/m16", "val/srp/m64", "val/rho_hat/m16", "val/local_gain/m16", "val/balance/local_cv/m16")
    for name, weight in {"a-seed0": 0.0, "b-seed0": 0.3}.items():
        write_run("runs", name, weight=weight, metrics=dict.fromkeys(of_segments))
    assert report("runs", "--out", "out") == 0
    assert "LRU misses" in Path("out/report.html").read_text()


def test_a_collapsed_run_is_marked_everywhere(folder, capsys):
    write_run("runs", "a-seed0")
    write_run("runs", "b-seed0", weight=1.0, hits=0.9, metrics={"val/balance/min_share": 0.05})
    runs, _ = read_folder(Path("runs"))
    assert [run.collapsed for run in runs] == [False, True]
    assert report("runs", "--out", "out") == 0
    assert "b-seed0 (collapsed)" in capsys.readouterr().out
    assert re.search(r'<tr class="marked" [^>]*><td>b-seed0 \(collapsed\)', Path("out/report.html").read_text())


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


def test_rows_alone_give_all_that_the_folders_give(drawing):
    write_losses("runs", seeds=(0,))
    assert report("runs", "--append-csv", "rows.csv", "--out", "a") == 0
    assert report("rows.csv", "--out", "b") == 0
    names = sorted(path.name for path in Path("a").iterdir())
    assert names == sorted(path.name for path in Path("b").iterdir())
    assert "cost.png" in names
    for name in names:
        if name.endswith(("png", "csv")):
            assert Path("a", name).read_bytes() == Path("b", name).read_bytes(), name
    tables = Findings(read_csv(Path("rows.csv")), []).tables()
    assert tables == Findings(read_folder(Path("runs"))[0], []).tables()


def test_rows_committed_before_labels_and_curves_were_kept_are_still_read():
    rows = ROOT / "recipes" / "results" / "demo_seeds.csv"
    (run, *_) = runs = read_csv(rows)
    assert (run.labels, run.curve, run.options) == ({}, {}, {})
    assert len(pair_runs(runs)) == 5


def test_a_vocabulary_that_differs_is_refused_and_one_that_was_not_recorded_is_not(folder):
    for name, vocabulary in (("a", "0" * 64), ("b", "1" * 64), ("c", None)):
        write_run("runs", name, vocabulary=vocabulary)
    assert report("runs/a", "runs/c", "--out", "out") == 0
    with pytest.raises(ValueError, match=r"vocabulary 000000000000.* and 1111"):
        report("runs/a", "runs/b")


def test_what_differs_within_a_loss_is_part_of_its_name(folder):
    for name, options in (("margin", {"membership": "margin"}), ("soft", {"membership": "probability", "tau": 2})):
        write_run("runs", f"{name}-seed0", weight=0.1, options=options)
    write_run("runs", "sticky-seed0", weight=0.1, loss="StickyLoss", options={"window": 8})
    assert loss_labels(read_folder(Path("runs"))[0]) == {
        "margin-seed0": "LocalConsistency (membership=margin, no tau)",
        "soft-seed0": "LocalConsistency (membership=probability, tau=2)",
        "sticky-seed0": "Sticky",
    }


def test_an_interrupted_run_has_the_curve_of_all_its_parts(folder):
    path = write_run("runs", "a", course=[(199, 80.0, 0.45), (399, 70.0, 0.5), (400, 70.0, 0.5)])
    (path / "metrics-1.csv").write_text("step,val/ppl,val/cache/lru_25pct\n99,90.0,0.4\n199,81.0,0.41\n")
    (path / "metrics-2.csv").touch()
    assert read_run(path).curve == {
        "tokens": [307_200, 614_400, 1_228_800],
        "val/ppl": [90.0, 80.0, 70.0],
        "val/cache/lru_25pct": [0.4, 0.45, 0.5],
    }


MEDIA = {
    "val/cache/curve": {"_type": "image-file", "path": "media/images/curve.png", "width": 600, "height": 400},
    "val/experts": {"_type": "table-file", "path": "media/table/experts.json", "nrows": 96, "ncols": 6},
}


class WandbRun:
    """As wandb.Api gives it, from what result.json holds, with the pictures that its monitor logged."""

    def __init__(self, result, history=(), finished=True):
        self.name, self.history = result["name"], history
        self.config = {"config": result["config"], "versions": result["versions"]}
        kept = {key: value for key, value in result.items() if key not in ("config", "metrics")}
        self.summary_metrics = result["metrics"] | MEDIA | {"_step": 3} | ({"result": kept} if finished else {})

    def scan_history(self, keys):
        return (row for row in self.history if set(keys) <= row.keys())


class WandbApi:
    """Runs by group; the first call says what was asked for."""

    def __init__(self, groups):
        self.groups, self.asked = groups, []

    def __call__(self):
        return self

    def runs(self, path, filters, lazy):
        self.asked.append((path, filters))
        if path != "me/moe":
            raise ValueError(f"could not find project {path}")
        return iter([run for name, group in self.groups.items() if filters in ({}, {"group": name}) for run in group])


@pytest.fixture
def api(monkeypatch):
    row = {"trainer/global_step": 199, "val/ppl": 80.0, "val/cache/lru_25pct": 0.3, "_step": 1}
    history = [{"trainer/global_step": 9, "train/ce": 4.0}, row, row | {"trainer/global_step": 400, "val/ppl": 70.0}]
    demo = [
        WandbRun(result("off-seed0"), history),
        WandbRun(result("on-seed0", weight=0.3, hits=0.6, metrics={"val/overlap": "NaN"}), history),
        WandbRun(result("half-seed0"), finished=False),
    ]
    evaluation = WandbRun(result("evaluation"))
    evaluation.config = {"model": "olmoe"}
    fake = WandbApi({"demo": [*demo, evaluation], "other": [WandbRun(result("other"))]})
    monkeypatch.setattr(wandb, "Api", fake)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    return fake


def test_runs_come_from_a_group_in_wandb_as_from_folders(folder, api, capsys):
    assert report("wandb:me/moe/demo", "--out", "out") == 0
    assert "wandb:me/moe/demo: left out, not finished: half-seed0" in capsys.readouterr().err
    write_run("runs", "off-seed0")
    write_run("runs", "on-seed0", weight=0.3, hits=0.6, metrics={"val/overlap": math.nan})
    assert report("runs", "--out", "folders") == 0
    here, there = (pd.read_csv(f"{out}/table.csv") for out in ("out", "folders"))
    pd.testing.assert_frame_equal(here.drop(columns="curve"), there.drop(columns="curve"))
    curve = json.loads(here["curve"][0])
    assert curve == {"tokens": [614_400, 1_228_800], "val/ppl": [80.0, 70.0], "val/cache/lru_25pct": [0.3, 0.3]}
    assert not MEDIA.keys() & set(here)
    assert len(gather(["wandb:me/moe"])) == 3
    assert api.asked == [("me/moe", {"group": "demo"}), ("me/moe", {})]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("wandb:me", r"wandb:ENTITY/PROJECT\[/GROUP\], got 'wandb:me'"),
        ("wandb:me//demo", "got 'wandb:me//demo'"),
        ("wandb:me/none", "wandb:me/none cannot be read: could not find project me/none"),
        ("wandb:me/moe/empty", "wandb:me/moe/empty has no finished run"),
    ],
)
def test_an_address_in_wandb_that_gives_no_runs_says_why(address, message, folder, api):
    with pytest.raises(ValueError, match=message):
        report(address)


def test_without_a_login_wandb_is_not_asked(folder, api, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("HOME", str(folder))
    with pytest.raises(ValueError, match="wandb:me/moe needs a login, and there is none: run `wandb login`"):
        report("wandb:me/moe")
    assert api.asked == []


@pytest.mark.parametrize(
    "page", ["README.md", "docs/ablations.md", "docs/choosing.md", "docs/finetuning.md", "docs/results.md"]
)
def test_tables_in_the_docs_are_those_of_the_committed_rows(tmp_path, page):
    text = (ROOT / page).read_text()
    sources = dict.fromkeys(match["source"] for match in MARKED.finditer(text))
    assert sources
    for source in sources:
        runs = read_csv(ROOT / source)
        copy = tmp_path / "page.md"
        copy.write_text(text)
        update(copy, source, Findings(runs, pair_runs(runs)).tables())
        assert copy.read_text() == text, f"{source}: make results"


def test_committed_pictures_are_of_the_committed_rows():
    pictures = list(ROOT.glob("docs/*/*.png"))
    assert pictures
    for path in pictures:
        rows = read_csv(ROOT / "recipes" / "results" / f"{path.parent.name}.csv")
        assert Image.open(path).text["Source"] == fingerprint(rows), f"{path}: make results"
