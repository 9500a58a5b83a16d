"""`consistency-reg fit` as a user runs it: recipes, run folders, interruption, wandb, and what it refuses."""

import json
import signal
from pathlib import Path

import pytest
import torch
import yaml
from wandb_file import read_run

from consistency_reg.lm import fit
from consistency_reg.lm.run import RunProgress

RECIPES = sorted(Path(__file__).parents[1].joinpath("recipes").glob("*.yaml"))
RECIPES = [path for path in RECIPES if path.stem != "finetune"]  # which begins with a checkpoint: test_finetune.py
SMALL = {  # the smallest run that has everything: two domains, documents shorter than rows, a validation
    "data.domains": "[math, cpp]",
    "data.corpus_bytes": 60_000,
    "data.vocab_size": 300,
    "data.sequence_length": 64,
    "data.batch_size": 2,
    "data.validation_tokens": 256,
    "data.num_workers": 0,
    "model.model.init_args.hidden_size": 32,
    "model.model.init_args.num_layers": 2,
    "model.model.init_args.num_heads": 2,
    "model.model.init_args.expert_size": 8,
    "model.warmup_steps": 1,
    "consistency.start_step": 0,
    "trainer.max_steps": 2,
    "trainer.accelerator": "cpu",
    "trainer.precision": 32,
    "trainer.log_every_n_steps": 1,
    "trainer.enable_progress_bar": False,
}


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("CONSISTENCY_REG_CACHE", str(tmp_path_factory.mktemp("corpus")))
        yield


def arguments(run_dir, recipe="quickstart", **changes) -> list[str]:
    path = Path(__file__).parents[1] / "recipes" / f"{recipe}.yaml"
    options = SMALL | {"run_dir": run_dir} | {key.replace("__", "."): value for key, value in changes.items()}
    return ["--config", str(path)] + [f"--{key}={value}" for key, value in options.items()]


def result(run_dir) -> dict:
    return json.loads(Path(run_dir, "result.json").read_text())


def _rows(path: Path) -> list[str]:
    return path.read_text().splitlines()[1:]


@pytest.mark.parametrize("recipe", [path.stem for path in RECIPES])
def test_every_recipe_is_accepted_as_it_is_and_runs_two_steps_when_made_small(recipe, tmp_path):
    fit.check_config(["--config", str(Path(__file__).parents[1] / "recipes" / f"{recipe}.yaml")])
    assert fit.main(arguments(tmp_path / "run", recipe)) == 0
    run = result(tmp_path / "run")
    assert run["steps"] == 2
    assert run["tokens"] == 2 * 2 * 64
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


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    options = {"trainer__max_steps": 6, "checkpoint_every": 2, "consistency__weight": 1.0}
    fit.main(arguments(tmp_path / "straight", **options))

    began = RunProgress.on_train_batch_start

    def press_control_c(self, trainer, *args):
        began(self, trainer, *args)
        if trainer.global_step == 2:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(RunProgress, "on_train_batch_start", press_control_c)
        with pytest.raises(SystemExit):
            fit.main(arguments(tmp_path / "stopped", **options))
    assert not (tmp_path / "stopped" / "result.json").exists()
    assert fit.main(arguments(tmp_path / "stopped", **options)) == 0

    steps = [
        row.split(",")[1] for name in ("metrics-1", "metrics") for row in _rows(tmp_path / "stopped" / f"{name}.csv")
    ]
    assert [int(step) for step in dict.fromkeys(steps)][:6] == [0, 1, 2, 3, 4, 5]
    straight, resumed = result(tmp_path / "straight"), result(tmp_path / "stopped")
    assert resumed["metrics"] == pytest.approx(straight["metrics"], rel=1e-6)
    assert resumed["tokens"] == straight["tokens"]


def test_a_finished_run_is_not_run_again(tmp_path, capsys):
    fit.main(arguments(tmp_path / "run"))
    before = (tmp_path / "run" / "result.json").stat().st_mtime_ns
    assert fit.main(arguments(tmp_path / "run")) == 0
    assert "is finished" in capsys.readouterr().out
    assert (tmp_path / "run" / "result.json").stat().st_mtime_ns == before


def test_wandb_holds_configuration_metrics_and_summary(tmp_path):
    fit.main(arguments(tmp_path / "run"))
    config, history = read_run(tmp_path / "run")
    assert config["config"]["consistency"]["weight"] == result(tmp_path / "run")["config"]["consistency"]["weight"]
    assert config["corpus_sha256"] == result(tmp_path / "run")["corpus"]
    assert config["versions"]["torch"] == torch.__version__
    training = [row for row in history if "train/consistency/loss" in row]
    assert len(training) == 2
    assert all(row["train/consistency/weighted"] >= 0 for row in training)
    validation = [row for row in history if "val/srp/m16" in row]
    assert validation[-1]["val/ppl"] == pytest.approx(result(tmp_path / "run")["metrics"]["val/ppl"])


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
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_misspelt_key_in_a_recipe_file_is_refused(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"consistency": {"wait": 1.0}}))
    with pytest.raises(ValueError, match=r"wait"):
        fit.check_config(["--config", str(recipe)])


def test_a_folder_that_holds_another_recipe_is_refused(tmp_path):
    fit.main(arguments(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"holds a run of another recipe \(consistency.weight: "):
        fit.main(arguments(tmp_path / "run", consistency__weight=0.7))


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
