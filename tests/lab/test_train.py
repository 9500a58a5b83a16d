"""`consistency-reg fit` as a user runs it: recipes, run folders, interruption, wandb, and what it refuses."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from killed import mounted
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from places import ROOT
from small_run import small_run
from wandb_file import read_run, read_runs

from consistency_reg.lab import train as fit
from consistency_reg.lab.provenance import device_name
from consistency_reg.lab.report.runs import read_run as read_finished
from consistency_reg.lab.run_loggers import MetricsFile, run_loggers
from consistency_reg.lab.run_progress import RunProgress

RECIPES = sorted(ROOT.joinpath("recipes").glob("*.yaml"))
RECIPES = [path for path in RECIPES if not path.stem.startswith(("finetune", "upcycle"))]  # of checkpoints


def arguments(run_dir, recipe="quickstart", **changes) -> list[str]:
    given = {key.replace("__", "."): value for key, value in changes.items()}
    return small_run(run_dir, recipe, {"wandb_project": None} | given)


def result(run_dir) -> dict:
    return json.loads(Path(run_dir, "result.json").read_text())


def _rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


@pytest.mark.parametrize("recipe", [path.stem for path in RECIPES])
def test_every_recipe_is_accepted_as_it_is_and_runs_two_steps_when_made_small(recipe, tmp_path):
    fit.check_config(["--config", str(ROOT / "recipes" / f"{recipe}.yaml")])
    assert fit.main(arguments(tmp_path / "run", recipe)) == 0
    run = result(tmp_path / "run")
    assert run["steps"] == 2
    assert run["tokens"] == 2 * run["config"]["trainer"]["accumulate_grad_batches"] * 2 * 64
    assert set(run["corpus"]) == {"math", "cpp"}
    metrics = run["metrics"]
    for name in (
        "ppl",
        "ppl/math",
        "srp/m4",
        "srp/m16/cpp",
        "srp/m64/layer_01",
        "rho_hat/m16",
        "static_srp",
        "overlap",
    ):
        assert metrics[f"val/{name}"] > 0, name
    for name in ("cache/lru_k", "cache/lru_2k", "cache/lru_25pct", "balance/min_share", "balance/local_cv/m16"):
        assert metrics[f"val/{name}"] >= 0, name
    assert metrics["val/local_gain/m16"] == pytest.approx(metrics["val/srp/m16"] - metrics["val/static_srp"], abs=1e-6)
    assert (tmp_path / "run" / "model" / "config.json").exists()


def test_runs_of_one_seed_are_pairs(tmp_path):
    """Same weights, same data, same steps: without weight the regularizer's run is the baseline's."""
    for name, weight in (("a", 0.0), ("b", 0.0), ("c", 5.0)):
        fit.main(arguments(tmp_path / name, consistency__weight=weight, consistency__warmup_steps=0))
    same, other = result(tmp_path / "a")["metrics"], result(tmp_path / "c")["metrics"]
    assert result(tmp_path / "b")["metrics"] == same
    assert other["val/ce"] != same["val/ce"]


def test_shared_experts_keep_the_parameters(tmp_path):
    fit.main(arguments(tmp_path / "routed", "baseline"))
    fit.main(arguments(tmp_path / "shared", "shared"))
    routed, shared = (result(tmp_path / name)["parameters"] for name in ("routed", "shared"))
    for kind in ("total", "active"):
        assert shared[kind] == pytest.approx(routed[kind], rel=0.01)


SLEPT = 3.0  # seconds of the first session, more than reading a recipe takes
TWO_VALIDATIONS = {
    "trainer__max_steps": 6,
    "trainer__val_check_interval": 3,
    "checkpoint_every": 2,
    "consistency__weight": 1.0,
}


def stop(monkeypatch, hook, replacement, argv, error=SystemExit):
    """What ends a run in which ``replacement`` stands for a hook of its progress."""
    with monkeypatch.context() as patch:
        patch.setattr(RunProgress, hook, replacement)
        with pytest.raises(error) as stopped:
            fit.main(argv)
    return stopped.value


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight") / "run"
    fit.main(arguments(folder, **TWO_VALIDATIONS))
    return folder


@pytest.mark.parametrize(
    ("hook", "at", "saved"),
    [
        pytest.param("on_train_batch_start", 0, 1, id="before the first checkpoint"),
        pytest.param("on_train_batch_start", 2, 3, id="in a step", marks=pytest.mark.slow),
        pytest.param("on_validation_batch_end", 3, 4, id="in a validation", marks=pytest.mark.slow),
        pytest.param("on_validation_batch_end", 6, 6, id="in the last validation of fit"),
    ],
)
def test_an_interrupted_run_goes_on_where_it_stopped(hook, at, saved, straight, tmp_path, monkeypatch, capsys):
    original, pressed = getattr(RunProgress, hook), []

    def press_control_c(self, trainer, *args):
        original(self, trainer, *args)
        if trainer.global_step == at and not pressed:
            pressed.append(True)
            time.sleep(SLEPT)
            signal.raise_signal(signal.SIGINT)

    stop(monkeypatch, hook, press_control_c, arguments(tmp_path / "stopped", **TWO_VALIDATIONS))
    told = capsys.readouterr().err
    assert "once more to stop at once" in told
    assert f"saved step {saved} of 6 in {tmp_path / 'stopped' / 'checkpoints' / 'last.ckpt'}" in told
    assert not (tmp_path / "stopped" / "result.json").exists()
    began = time.monotonic()
    assert fit.main(arguments(tmp_path / "stopped", **TWO_VALIDATIONS)) == 0
    took = time.monotonic() - began

    rows = [row for name in ("metrics-1", "metrics") for row in _rows(tmp_path / "stopped" / f"{name}.csv")]
    assert [int(row["step"]) for row in rows if row.get("train/ce")] == [0, 1, 2, 3, 4, 5]
    last = 5  # Lightning logs what comes after the last step under its number, or the next
    validated = [min(int(row["step"]), last) for row in rows if row.get("val/ce")]
    assert validated == [min(int(row["step"]), last) for row in _rows(straight / "metrics.csv") if row.get("val/ce")]
    uninterrupted, resumed = result(straight), result(tmp_path / "stopped")
    assert resumed["metrics"] == pytest.approx(uninterrupted["metrics"], rel=1e-6)
    assert resumed["tokens"] == uninterrupted["tokens"]
    assert resumed["wall_time_s"] > took, "that of the first session is missing"


ACCUMULATED = {  # two epochs of three steps; the last step of each has a remainder of one micro-batch
    "trainer__accumulate_grad_batches": 2,
    "trainer__limit_train_batches": 5,
    "trainer__max_epochs": 2,
    "trainer__max_steps": 6,
    "checkpoint_every": 2,
    "model__balance__accumulation_steps": 2,
}


@pytest.fixture(scope="module")
def accumulated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("accumulated") / "run"
    fit.main(arguments(folder, **ACCUMULATED))
    return folder


@pytest.mark.parametrize(
    ("batch", "saved"),
    [
        pytest.param(0, 1, id="in the first micro-batch"),
        pytest.param(2, 2, id="in the first after a checkpoint", marks=pytest.mark.slow),
        pytest.param(4, 3, id="in the remainder of an epoch"),
    ],
)
def test_ctrl_c_within_an_accumulation_waits_for_its_step(batch, saved, accumulated, tmp_path, monkeypatch, capsys):
    original = RunProgress.on_train_batch_start

    def press_control_c(self, trainer, module, data, batch_idx):
        original(self, trainer, module, data, batch_idx)
        if (trainer.current_epoch, batch_idx) == (0, batch):
            signal.raise_signal(signal.SIGINT)

    stop(monkeypatch, "on_train_batch_start", press_control_c, arguments(tmp_path / "stopped", **ACCUMULATED))
    assert f"saved step {saved} of 6" in capsys.readouterr().err
    assert fit.main(arguments(tmp_path / "stopped", **ACCUMULATED)) == 0
    uninterrupted, resumed = result(accumulated), result(tmp_path / "stopped")
    assert resumed["tokens"] == uninterrupted["tokens"] == 10 * 2 * 64
    assert resumed["metrics"] == pytest.approx(uninterrupted["metrics"], rel=1e-6)


def test_no_checkpoint_is_written_within_an_accumulation(tmp_path, monkeypatch):
    """Also after a resume at a step that is saved at, where Lightning forgets that it has saved it."""
    original, saved = Trainer.save_checkpoint, []

    def save(self, *args, **kwargs):
        saved.append(self.fit_loop.epoch_loop.batch_progress.current.ready)
        original(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "save_checkpoint", save)
    changes = ACCUMULATED | {"trainer__limit_train_batches": 8, "trainer__max_epochs": 1, "trainer__max_steps": 4}
    stop(monkeypatch, "on_train_batch_start", stop_at_step(2), arguments(tmp_path / "run", **changes), error=KeyError)
    fit.main(arguments(tmp_path / "run", **changes))
    assert saved
    assert all(batches % 2 == 0 for batches in saved), saved


def stop_at_step(step):
    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == step:
            raise KeyError(step)

    return on_train_batch_start


def test_sigterm_ends_the_step_and_saves_it(tmp_path):
    """To a real process and its data workers, as an ablation ends a cell; the same command goes on."""
    steps = 20
    changes = {"trainer__max_steps": steps, "data__validation_tokens": 64, "checkpoint_every": steps}
    changes |= {"trainer__accumulate_grad_batches": 2, "data__num_workers": 1}
    argv = arguments(tmp_path / "run", **changes)
    process = start(argv, stderr=subprocess.PIPE, start_new_session=True, text=True)
    metrics = tmp_path / "run" / "metrics.csv"
    try:
        while process.poll() is None and not (metrics.exists() and len(_rows(metrics)) > 2):
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGTERM)
        said = process.communicate(timeout=60)[1]
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 128 + signal.SIGTERM, said
    assert "SIGTERM: saving after this step" in said
    assert "run the same command again" in said
    logged = len(_rows(metrics))
    assert f"saved step {logged} of {steps}" in said
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()
    assert fit.main(argv) == 0
    rows = [row for name in ("metrics-1", "metrics") for row in _rows(tmp_path / "run" / f"{name}.csv")]
    assert [int(row["step"]) for row in rows if row.get("train/ce")] == list(range(steps))
    assert result(tmp_path / "run")["tokens"] == steps * 2 * 2 * 64


def test_sigterm_in_the_validation_after_training_is_no_success(tmp_path, monkeypatch):
    def terminate(self, trainer, *args, **kwargs):
        if trainer.state.fn == "validate":
            signal.raise_signal(signal.SIGTERM)

    stopped = stop(monkeypatch, "on_validation_batch_end", terminate, arguments(tmp_path / "run"))
    assert stopped.code == 128 + signal.SIGTERM
    assert not (tmp_path / "run" / "result.json").exists()
    assert fit.main(arguments(tmp_path / "run")) == 0


@pytest.mark.parametrize(("second", "error"), [(signal.SIGINT, "KeyboardInterrupt"), (signal.SIGTERM, "SIGTERM")])
def test_a_second_signal_stops_at_once(second, error, tmp_path, monkeypatch):
    monkeypatch.setattr("consistency_reg.lab.run_progress.SAME_SECONDS", 0.0)

    def signals(self, trainer, *args):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(second)
        raise AssertionError("went on")

    stopped = stop(monkeypatch, "on_train_batch_start", signals, arguments(tmp_path / "run"))
    assert error in repr(stopped.__context__)
    assert not (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()


def start(argv, **options) -> subprocess.Popen:
    ours = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}  # else it would join it
    command = [sys.executable, "-m", "consistency_reg", "fit", *argv]
    return subprocess.Popen(command, env=ours | {"OMP_NUM_THREADS": "1"}, stdin=subprocess.DEVNULL, **options)


def test_a_killed_run_loses_at_most_what_came_after_its_last_checkpoint(tmp_path):
    """SIGKILL to a real process: its offline wandb file is readable, and the same command goes on as the same run."""
    every, steps = 5, 40
    argv = arguments(tmp_path / "run", trainer__max_steps=steps, checkpoint_every=every, data__validation_tokens=64)
    process = start(argv)
    try:
        while process.poll() is None and not any(len(run.history) > 5 for run in read_runs(tmp_path / "run")):
            time.sleep(0.2)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    logged = len(_rows(tmp_path / "run" / "metrics.csv"))
    assert fit.main(argv) == 0

    killed, resumed = read_runs(tmp_path / "run")
    assert killed.id == resumed.id == (tmp_path / "run" / "wandb-id").read_text()
    before = [row["trainer/global_step"] for row in killed.history if "train/ce" in row]
    after = [row["trainer/global_step"] for row in resumed.history if "train/ce" in row]
    assert before == list(range(len(before)))
    assert 4 < len(before) <= logged
    assert after == list(range(after[0], steps))
    assert logged - every <= after[0] <= logged + 1
    assert killed.config["config"] == resumed.config["config"]
    assert result(tmp_path / "run")["tokens"] == steps * 2 * 64


def test_a_run_in_the_working_folder_is_named_after_it(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    fit.main(arguments("."))
    assert result(".")["name"] == "here"
    run = read_run(tmp_path / "here")
    assert run.name == "here"
    assert "here-card" in [name for _, name, _ in run.artifacts]


def files_of(folder):
    return {path.relative_to(folder): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_a_checkpoint_that_is_due_at_the_last_step_in_a_folder_named_from_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert fit.main(arguments("runs/one", checkpoint_every=2)) == 0
    assert (tmp_path / "runs" / "one" / "result.json").exists()


def test_a_finished_run_is_not_run_again_also_on_a_disk_that_cannot_be_written(tmp_path, capsys):
    with mounted(tmp_path / "disk") as disk:
        fit.main(arguments(disk / "run", wandb_project=""))
        before = files_of(disk)
        assert Path("run/metrics.csv") in before
        for how in ("rw", "ro"):
            subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True)
            assert fit.main(arguments(disk / "run", wandb_project="")) == 0
            assert "is finished" in capsys.readouterr().out
            assert files_of(disk) == before
        with pytest.raises(OSError, match="nothing can be written here"):
            fit.main(arguments(disk / "other"))


def test_a_finished_run_goes_on_when_it_is_to_have_more_steps(tmp_path):
    changes = {"checkpoint_every": 1, "keep_checkpoints": 2, "wandb_project": ""}
    fit.main(arguments(tmp_path / "run", **changes))
    kept = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert kept == {"last.ckpt", "step=00000001.ckpt", "step=00000002.ckpt"}
    short, short_pair = result(tmp_path / "run"), read_finished(tmp_path / "run").pair
    assert fit.main(arguments(tmp_path / "run", trainer__max_steps=5, **changes)) == 0
    longer = result(tmp_path / "run")
    assert (short["steps"], longer["steps"], longer["went_on_from"]) == (2, 5, [2])
    assert longer["tokens"] == 5 * 2 * 64
    rows = [row for name in ("metrics-1", "metrics") for row in _rows(tmp_path / "run" / f"{name}.csv")]
    assert [int(row["step"]) for row in rows if row.get("train/ce")] == [0, 1, 2, 3, 4]
    assert json.loads((tmp_path / "run" / "result-1.json").read_text()) == short
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["trainer"]["max_steps"] == 5
    assert read_finished(tmp_path / "run").pair != short_pair
    kept = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert kept == {"last.ckpt", "step=00000004.ckpt", "step=00000005.ckpt"}
    with pytest.raises(ValueError, match=r"another recipe \(trainer.max_steps: 5 there, 2 now\)"):
        fit.main(arguments(tmp_path / "run", **changes))


def test_a_run_that_saved_nothing_but_its_end_goes_on_when_it_is_to_have_more_steps(tmp_path):
    for steps in (2, 4):
        assert fit.main(arguments(tmp_path / "run", trainer__max_steps=steps, wandb_project="")) == 0
        assert (result(tmp_path / "run")["steps"], result(tmp_path / "run")["tokens"]) == (steps, steps * 2 * 64)


def test_a_run_that_the_data_end_before_its_term_begins_is_warned_of(tmp_path):
    changes = {"trainer__limit_train_batches": 2, "trainer__max_steps": 60, "consistency__start_step": 30}
    with (
        pytest.warns(UserWarning, match="the data end this run after 2 of trainer.max_steps=60 steps: raise"),
        pytest.warns(UserWarning, match="the consistency term begins at step 30 and training ends after 2, so it has"),
    ):
        assert fit.main(arguments(tmp_path / "run", wandb_project="", **changes)) == 0


def test_a_second_fit_in_a_folder_is_told_who_trains_there(tmp_path, monkeypatch):
    said, original = [], RunProgress.on_train_end

    def train_again(self, trainer, *args):
        original(self, trainer, *args)
        with pytest.raises(RuntimeError) as refusal:
            fit.main(arguments(tmp_path / "run"))
        said.append(str(refusal.value))

    monkeypatch.setattr(RunProgress, "on_train_end", train_again)
    assert fit.main(arguments(tmp_path / "run")) == 0
    assert said[0].startswith(f"run_dir '{tmp_path / 'run'}' is being trained by process {os.getpid()} on ")
    assert [row["step"] for row in _rows(tmp_path / "run" / "metrics.csv") if row["train/ce"]] == ["0", "1"]


def test_a_checkpoint_takes_its_place_after_its_step_is_logged(tmp_path, monkeypatch):
    """Else a run that is killed between the two would go on after a step that nobody has logged."""
    original, last, seen = MetricsFile.log_metrics, tmp_path / "run" / "checkpoints" / "last.ckpt", []

    def log_metrics(self, metrics, step):
        if "train/ce" in metrics:
            seen.append((step, torch.load(last, weights_only=False)["global_step"] if last.exists() else 0))
        original(self, metrics, step)

    monkeypatch.setattr(MetricsFile, "log_metrics", log_metrics)
    changes = {"checkpoint_every": 1, "trainer__max_steps": 3, "trainer__val_check_interval": 2, "wandb_project": ""}
    fit.main(arguments(tmp_path / "run", **changes))
    assert seen == [(0, 0), (1, 1), (2, 2)]


def test_a_full_disk_is_said_and_the_run_goes_on_when_there_is_room(tmp_path, monkeypatch):
    with mounted(tmp_path / "disk", size="16m") as disk:
        changes = {"checkpoint_every": 1, "trainer__max_steps": 4, "wandb_project": ""}
        run_dir = disk / "run"

        def fill(self, trainer, *_):
            if trainer.global_step == 3:
                room = os.statvfs(disk)
                disk.joinpath("filler").write_bytes(bytes(room.f_bavail * room.f_bsize))

        argv = arguments(run_dir, **changes)
        full = stop(monkeypatch, "on_train_batch_end", fill, argv, error=OSError)
        assert full.filename == str(run_dir / "checkpoints")
        assert "No space left on device: last.ckpt could not be written (the former one is untouched)" in full.strerror
        disk.joinpath("filler").unlink()
        assert fit.main(argv) == 0
        rows = [row for name in ("metrics-1", "metrics") for row in _rows(run_dir / f"{name}.csv")]
        steps = [int(row["step"]) for row in rows if row.get("train/ce")]
        assert sorted(set(steps)) == [0, 1, 2, 3]
        assert len(steps) <= 5


def test_a_damaged_checkpoint_is_said_before_anything_is_touched(tmp_path, monkeypatch):
    argv = arguments(tmp_path / "run", checkpoint_every=1, wandb_project="")
    stop(monkeypatch, "on_train_batch_start", stop_at_step(1), argv, error=KeyError)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:1000])
    before = files_of(tmp_path / "run")
    with pytest.raises(ValueError, match=r"last.ckpt is damaged .*: remove it to begin anew, with the same command"):
        fit.main(argv)
    assert files_of(tmp_path / "run") == before
    last.unlink()
    assert fit.main(argv) == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "open', r"mine\.jsonl, line 3: "),
        ('{"text": 3}', r"mine\.jsonl, line 3: "),
        (None, "batch_size must"),
    ],
)
def test_a_mistake_in_the_data_leaves_no_folder_and_the_corrected_command_trains(tmp_path, line, message):
    data = tmp_path / "mine.jsonl"
    documents = [json.dumps({"text": f"A document with a number, {i}, and some words. " * 20}) for i in range(30)]
    data.write_text("\n".join([*documents[:2], line or documents[2], *documents[3:]]))
    sources = {"mine": {"path": "json", "data_files": str(data)}}
    changes = {"data__domains": "null", "data__data": json.dumps(sources), "wandb_project": ""}
    with pytest.raises(ValueError, match=message):
        fit.main(arguments(tmp_path / "run", **changes, **({} if line else {"data__batch_size": 4000})))
    assert not (tmp_path / "run").exists()
    data.write_text("\n".join(documents))
    assert fit.main(arguments(tmp_path / "run", **changes)) == 0


def test_a_run_of_former_times_goes_on_under_todays_names_and_keys(tmp_path, monkeypatch):
    argv = arguments(tmp_path / "run", checkpoint_every=1, wandb_project="")
    stop(monkeypatch, "on_train_batch_start", stop_at_step(1), argv, error=KeyError)
    path = tmp_path / "run" / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["model"]["model"]["class_path"] = "consistency_reg.lm.model.small_moe"
    del config["keep_checkpoints"], config["model"]["model"]["init_args"]["dense_layers"]
    path.write_text(yaml.safe_dump(config))
    assert fit.main(argv) == 0
    config["consistency"]["weight"] = 7.0
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match=r"another recipe \(consistency.weight: 7.0 there, 0.35 now\)"):
        fit.main(argv)


def test_wandb_holds_configuration_metrics_summary_and_the_model_card(tmp_path):
    fit.main(arguments(tmp_path / "run"))
    run, written = read_run(tmp_path / "run"), result(tmp_path / "run")
    assert run.config["config"] == written["config"]
    assert run.config["corpus_sha256"] == written["corpus"]
    assert run.config["versions"]["torch"] == torch.__version__
    assert run.config["git_commit"] == written["git_commit"]
    assert run.config["device"] == written["device"] == device_name()
    training = [row for row in run.history if "train/consistency/loss" in row]
    assert [row["trainer/tokens"] for row in training] == [2 * 64, 2 * 2 * 64]
    assert all(row["train/consistency/weighted"] >= 0 for row in training)
    validation = [row for row in run.history if "val/srp/m16" in row]
    assert validation[-1]["val/ppl"] == pytest.approx(written["metrics"]["val/ppl"])
    for name, value in written["metrics"].items():
        assert run.summary[name] == pytest.approx(value), name
    assert run.summary["result"]["tokens"] == written["tokens"]
    assert run.summary["best/val/ppl"] == pytest.approx(min(row["val/ppl"] for row in validation))
    assert len(run.images("val/routing/math")) == len(run.images("val/routing/cpp")) == len(validation)
    assert {row[4] for row in run.table("val/experts")["data"]} <= {"math", "cpp", None}
    assert ("model-card", "run-card", ["README.md", "config.yaml"]) in run.artifacts
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert f"| perplexity | {written['metrics']['val/ppl']:.4g} |" in card
    assert written["command"] in card


def test_wandb_is_off_without_a_project_or_when_disabled_and_offline_without_a_login(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("NETRC", "WANDB_API_KEY", "WANDB_CONFIG_DIR", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)  # where wandb's process of this module's other runs is not
    fit.main(arguments(Path("offline")))
    assert read_run(tmp_path / "offline").history
    fit.main(arguments(tmp_path / "none", wandb_project=""))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    fit.main(arguments(tmp_path / "disabled"))
    for name in ("none", "disabled"):
        assert not list((tmp_path / name).rglob("*.wandb"))
        assert result(tmp_path / name)["metrics"] == result(tmp_path / "offline")["metrics"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"consistency__weight": -0.5}, "weight must be a finite number >= 0"),
        ({"consistency__weight": "nan"}, "consistency.weight"),
        ({"consistency__wieght": 0.5}, "consistency.wieght"),
        (
            {"consistency__loss__segment_lengths": "[1, 4]"},
            "segment_lengths must be a list of distinct integers of at least 2",
        ),
        ({"consistency__loss__segment_lengths": "[4, 65]"}, "must not exceed the context"),
        ({"monitor__segment_lengths": "[4, 65]"}, "must not exceed the context"),
        ({"data__domains": "[math, opera]"}, "domains must be among"),
        ({"model__model__init_args__shared_experts": 4}, "at least one active expert"),
        ({"model__model__init_args__vocab_size": 77}, "follows from data.vocab_size"),
    ],
)
def test_bad_recipes_are_refused_before_anything_is_written(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        fit.check_config(arguments(tmp_path / "run", **changes))
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        fit.main(arguments(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_misspelt_key_in_a_recipe_file_is_refused(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"consistency": {"wait": 1.0}}))
    with pytest.raises(ValueError, match=r"wait"):
        fit.check_config(["--config", str(recipe)])


def test_a_folder_that_holds_another_recipe_is_refused(tmp_path):
    fit.main(arguments(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"holds a run of another recipe \(consistency.weight: "):
        fit.main(arguments(tmp_path / "run", consistency__weight=0.7))


def test_the_folder_of_a_run_may_be_called_by_any_of_its_names(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fit.main(arguments("run", wandb_project=""))
    assert result("run")["wandb_dir"] == ""
    progress = json.loads(Path("run/progress.json").read_text())
    assert (progress["step"], progress["remaining_s"]) == (2, 0)
    with pytest.raises(ValueError, match="run_dir must be the folder of the run, got ''"):
        fit.main(arguments(""))
    for name in ("run/", "./run", tmp_path / "run"):
        assert fit.main(arguments(name, wandb_project="")) == 0
        assert "is finished" in capsys.readouterr().out


def test_empty_files_of_a_run_that_found_no_space_are_written_anew(tmp_path):
    for name in ("config.yaml", "wandb-id"):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / name).touch()
    fit.main(arguments(tmp_path / "run"))
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["run_dir"] == str(tmp_path / "run")
    assert read_run(tmp_path / "run").id == (tmp_path / "run" / "wandb-id").read_text()


def test_only_the_first_process_writes_what_all_share(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    cli = fit.parse(fit.RecipeCLI, arguments(tmp_path / "run"))
    with fit.claimed(cli):
        run_loggers(cli.folder, "project")
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    with fit.claimed(cli):
        assert cli.folder.config.read_text() == cli.recipe
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    fit.parse(fit.RecipeCLI, arguments(tmp_path / "run"))
    with pytest.raises(ValueError, match="another recipe"):
        fit.parse(fit.RecipeCLI, arguments(tmp_path / "run", seed_everything=2))


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    fit.main(arguments(tmp_path / "run"))
    other = tmp_path / "other" / "checkpoints"
    other.mkdir(parents=True)
    other.joinpath("last.ckpt").write_bytes((tmp_path / "run" / "checkpoints" / "last.ckpt").read_bytes())
    with pytest.raises(ValueError, match="checkpoint of another model"):
        fit.main(arguments(tmp_path / "other", model__model__init_args__hidden_size=64))


def test_a_folder_that_cannot_be_written_is_one_message(tmp_path):
    tmp_path.joinpath("file").write_text("")
    with pytest.raises(OSError, match="file"):
        fit.main(arguments(tmp_path / "file" / "run"))
