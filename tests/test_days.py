"""Three days of three users, each a script in an empty folder, with the package from its wheel."""

import csv
import json
import math
import re
import subprocess
import sysconfig
from pathlib import Path

import pytest
from places import ROOT
from wandb_file import read_run
from wheels import built_wheel, new_python, user_environment

DAYS = ROOT / "tests" / "days"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """Give the interpreter of a virtual environment with the wheel; other packages are those of this environment."""
    folder = tmp_path_factory.mktemp("days")
    python = new_python(folder, "--no-deps", "--no-index", built_wheel(folder))
    (packages,) = folder.glob("venv/lib/python*/site-packages")
    # A folder that a .pth file names is searched, but its own .pth files, which lead to the checkout, are not read.
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def live(python, day, folder):
    """Run the script of a day in a folder and return all that it printed."""
    environment = user_environment() | {"HOME": str(folder), "XDG_CACHE_HOME": str(folder / ".cache"), "COLUMNS": "120"}
    script = [str(python), str(DAYS / f"{day}.py")]
    done = subprocess.run(
        script, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def test_the_package_is_that_of_the_wheel(python, tmp_path):
    command = [str(python), "-c", "import consistency_reg; print(consistency_reg.__file__)"]
    done = subprocess.run(command, cwd=tmp_path, env=user_environment(), capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).is_relative_to(python.parents[1])


def test_the_fine_tuner_finds_both_models_compared_and_collapse_in_sight(python, tmp_path):
    said = live(python, "fine_tuner", tmp_path)
    result = json.loads((tmp_path / "runs/tuned/result.json").read_text())
    assert {"val/ppl", "val/cache/lru_2k"} <= {*result["before"]} & {*result["metrics"]}
    assert "runs/base" in (tmp_path / "runs/tuned/model/README.md").read_text()
    assert "tuned has " in said
    assert "Before and after fine-tuning" in said
    for trainer in ("trainer", "trl"):
        logged = {name for row in json.loads((tmp_path / trainer / "history.json").read_text()) for name in row}
        assert "train/consistency/loss" in logged or "consistency/loss" in logged, trainer
    assert (tmp_path / "trainer/model/config.json").exists()
    rows = list(csv.DictReader((tmp_path / "evaluation/cache_aware.csv").open()))
    assert {row["model"] for row in rows} == {"before", "after"}
    assert all(float(row["perplexity"]) > 1 for row in rows)
    assert re.search(r"after, 8 slots: \+0\.5% perplexity buys", said)
    assert re.search(r"generated 16 tokens with \d+ hits and [1-9]\d* misses", said)


def test_the_ablation_runner_gets_a_report_of_every_cell_and_rows_to_commit(python, tmp_path):
    said = live(python, "ablation_runner", tmp_path)
    finished = {path.parent.name for path in tmp_path.glob("runs/mine/*/result.json")}
    assert finished == {f"{cell}-seed{seed}" for cell in ("off", "srp", "remoe") for seed in (0, 1)}
    assert (tmp_path / "runs/mine/report/report.html").stat().st_size > 100_000
    assert {"frontier.png", "deployed.png"} <= {path.name for path in (tmp_path / "pictures").iterdir()}
    rows = list(csv.DictReader((tmp_path / "results/mine.csv").open()))
    assert len(rows) == 6
    assert all(row["command"] and math.isfinite(float(row["val/ppl"])) for row in rows)
    assert len(list(csv.DictReader((tmp_path / "results/mine_priced.csv").open()))) == 18
    page = (tmp_path / "RESULTS.md").read_text()
    assert page.count("\n| srp") == 2  # in each of its two tables; so small a run may be marked as collapsed
    assert "against off, the means of 2 seeds" in said
    assert "As deployed with 2 x K slots" in said


def test_the_tracker_finds_routing_and_the_tradeoff_in_wandb_and_csv(python, tmp_path):
    live(python, "tracker", tmp_path)
    own = read_run(tmp_path)
    names = {name for row in own.history for name in row}
    assert {"val/srp/m16", "val/static_srp", "val/cache/lru_2k", "val/balance/cv", "tradeoff/val_loss"} <= names
    assert {"train/consistency/loss", "val/experts", "val/domains"} <= names
    (metrics,) = (tmp_path / "logs").glob("**/metrics.csv")
    assert {"val/srp/m16", "val/cache/lru_25pct"} <= set(next(csv.reader(metrics.open())))
    assert list((tmp_path / "runs/first").glob("wandb/offline-run-*"))
    assert list((tmp_path / "report").glob("wandb/offline-run-*"))
