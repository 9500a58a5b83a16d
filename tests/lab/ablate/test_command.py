"""Ablations: a grid becomes cells, cells become runs; killed and started again, nothing is run twice or at once."""

import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from places import STUB_FIT
from rich.console import Console

from consistency_reg.lab.ablate import LocalLauncher, command, load_grid, run_cells, sweep
from consistency_reg.lab.ablate.launchers import cell_environment
from consistency_reg.lab.ablate.progress import CellState, LiveDisplay, remaining_seconds
from consistency_reg.lab.recipe_files import find_recipe

STUB = (sys.executable, str(STUB_FIT))
RECIPE = {"steps": 2, "seconds": 0.0, "model": {"width": 8, "depth": 1}}
GRID = {
    "recipe": "recipe.yaml",
    "runs": "runs/small",
    "grid": {
        "width": {"key": "model.width", "values": {"narrow": 8, "wide": 16}},
        "loss": {"values": {"plain": {}, "srp": {"consistency.weight": 0.3, "consistency.loss": {"m": [4, 16]}}}},
    },
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    Path("recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return tmp_path


def write_grid(**changes):
    content = {key: value for key, value in {**GRID, **changes}.items() if value is not None}
    Path("grid.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return Path("grid.yaml")


def ablate(*arguments, check=lambda arguments: None):
    return command.main([str(argument) for argument in arguments], command=STUB, check=check)


def starts(cell):
    return Path(cell, "starts.txt").read_text().splitlines()


def test_a_grid_is_every_value_with_every_other_and_every_seed(folder):
    cells = load_grid(write_grid(seeds=[0, 7])).cells
    assert [cell.name for cell in cells] == [
        "narrow-plain-seed0",
        "narrow-plain-seed7",
        "narrow-srp-seed0",
        "narrow-srp-seed7",
        "wide-plain-seed0",
        "wide-plain-seed7",
        "wide-srp-seed0",
        "wide-srp-seed7",
    ]
    assert cells[-1].config == {
        "model": {"width": 16},
        "consistency": {"weight": 0.3, "loss": {"m": [4, 16]}},
        "seed_everything": 7,
    }
    assert cells[-1].folder == Path("runs/small/wide-srp-seed7")


def test_a_list_of_values_labels_itself_and_a_list_of_cells_is_taken_as_it_is(folder):
    grid = load_grid(write_grid(grid={"model.width": [8, 0.5], "flag": {"key": "model.flag", "values": [True]}}))
    assert [cell.name for cell in grid.cells] == ["8-true-seed0", "0.5-true-seed0"]
    cells = [{"name": "a"}, {"name": "b", "overrides": {"model.width": 1, "model": {"depth": 3}}}]
    listed = load_grid(write_grid(grid=None, cells=cells)).cells
    assert [(cell.name, cell.config) for cell in listed] == [
        ("a-seed0", {"seed_everything": 0}),
        ("b-seed0", {"model": {"depth": 3, "width": 1}, "seed_everything": 0}),
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": {}}, "at least one axis"),
        ({"grid": {"a": []}}, "at least one value"),
        ({"grid": {"a": {"key": "x", "values": {}}}}, "at least one value"),
        ({"grid": None}, "either grid or cells, got neither"),
        ({"cells": [{"name": "a"}]}, "either grid or cells, got both"),
        ({"grid": None, "cells": []}, "at least one"),
        ({"grid": None, "cells": [{"name": "a"}, {"name": "a"}]}, "more than one a"),
        ({"grid": None, "cells": [{"name": "a", "set": {}}]}, r"cells\[0\] knows the keys name, overrides, got set"),
        ({"grids": {}}, "knows the keys .* got grids"),
        ({"recipe": None}, "recipe is missing"),
        ({"seeds": []}, "seeds must be a list of different integers"),
        ({"seeds": [1, 1]}, "seeds must be a list of different integers"),
        ({"seeds": ["one"]}, "seeds must be a list of different integers"),
        ({"grid": {"a": {"key": "x", "values": {True: 1}}}}, "put the label in quotes"),
        (
            {"grid": {"a": {"key": "x", "values": {"../up": 1}}}},
            "the name of a value",
        ),
        ({"grid": {"a.x": [[4, 16]]}}, "the name of a value"),
        ({"grid": {"a": {"values": {"x": 1}}}}, "must map recipe keys to values"),
        ({"grid": {"seed_everything": [1]}}, "must not set seed_everything"),
        ({"grid": {"run_dir": ["x"]}}, "must not set run_dir"),
        ({"grid": {"a.x": [1], "b.x": [2]}}, "axis 'x' must have a name of its own"),
        ({"grid": {"x": {"key": "k", "values": [1]}, "y": {"key": "k", "values": [2]}}}, "'x' and 'y' both set k"),
        ({"grid": {"a": {"values": {"x": {"m": 1, "m.n": 2}}}}}, "m.n cannot be set inside m"),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused_with_its_reason(folder, changes, message):
    with pytest.raises(ValueError, match=message) as refusal:
        load_grid(write_grid(**changes))
    assert str(refusal.value).startswith("grid.yaml: ")


def test_a_missing_file_or_recipe_is_named(folder):
    with pytest.raises(FileNotFoundError, match=r"no\.yaml"):
        load_grid(Path("no.yaml"))
    with pytest.raises(FileNotFoundError, match=r"there is no recipe nowhere\.yaml, nor does one come"):
        load_grid(write_grid(recipe="nowhere.yaml"))
    Path("broken.yaml").write_text("a: [")
    with pytest.raises(ValueError, match=r"broken\.yaml is no YAML"):
        load_grid(Path("broken.yaml"))


def test_a_grid_may_name_a_shipped_recipe_and_a_folder_below_home(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    grid = load_grid(write_grid(recipe="quickstart", runs="~/runs"))
    assert [recipe.name for recipe in grid.recipes] == ["quickstart.yaml"]
    assert grid.runs == tmp_path / "runs"


def test_what_lies_in_the_working_folder_is_not_taken_for_a_shipped_recipe(folder):
    Path("quickstart").mkdir()  # as a run of that name
    shipped = find_recipe("quickstart")
    assert shipped.name == "quickstart.yaml"
    Path("grids").mkdir()
    write_grid(recipe="quickstart.yaml").rename("grids/mine.yaml")
    Path("quickstart.yaml").write_text("{}")
    assert load_grid("grids/mine.yaml").recipes == (shipped,)


def test_every_cell_is_checked_before_the_first_is_trained(folder):
    def check(arguments):
        configs = [Path(arguments[i + 1]) for i, argument in enumerate(arguments) if argument == "--config"]
        assert configs[0] == Path("recipe.yaml")
        if yaml.safe_load(configs[1].read_text())["model"]["width"] == 16:
            raise ValueError("unknown key model.width")

    with pytest.raises(ValueError, match=r"cell wide-plain-seed0: unknown key model\.width"):
        ablate(write_grid(), check=check)
    assert not Path("runs").exists()


def test_all_cells_end_in_folders_of_their_own_and_are_not_run_again(folder, capsys):
    grid = write_grid()
    assert ablate(grid) == 0
    assert "4 cells run, 0 finished before, 0 failed" in capsys.readouterr().out
    assert sorted(path.parent.name for path in Path("runs/small").glob("*/result.json")) == [
        "narrow-plain-seed0",
        "narrow-srp-seed0",
        "wide-plain-seed0",
        "wide-srp-seed0",
    ]
    assert "step 1" in Path("runs/small/wide-srp-seed0/log.txt").read_text()
    assert ablate(grid) == 0
    assert "0 cells run, 4 finished before, 0 failed" in capsys.readouterr().out
    assert all(len(starts(cell)) == 1 for cell in Path("runs/small").iterdir())


def test_a_failing_cell_is_reported_and_does_not_stop_the_rest(folder, capsys):
    grid = write_grid(grid={"fail": {"key": "fail", "values": {"early": 0, "never": 99, "late": 1}}})
    assert ablate(grid) == 1
    output = capsys.readouterr()
    assert "1 cells run, 0 finished before, 2 failed" in output.out
    assert "early-seed0 failed: exit code 1" in output.err
    assert "no memory left at step 0" in output.err
    assert "no memory left at step 1" in output.err
    assert Path("runs/small/never-seed0/result.json").exists()


def test_a_cell_that_is_killed_is_reported_with_what_may_have_killed_it(folder, capsys):
    grid = write_grid(grid={"kill": {"key": "kill", "values": {"first": 1, "never": 99}}})
    assert ablate(grid) == 1
    output = capsys.readouterr()
    assert "1 cells run, 0 finished before, 1 failed" in output.out
    assert "first-seed0 failed: killed by SIGKILL (out of memory?)" in output.err


def test_only_runs_a_part_of_the_grid_and_a_dry_run_nothing(folder, capsys):
    grid = write_grid(seeds=[0, 1])
    assert ablate(grid, "--only", "loss=srp", "seed=1", "width=wide") == 0
    capsys.readouterr()
    assert ablate(grid, "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    assert [line for line in lines if "finished" in line] == ["wide-srp-seed1: finished"]
    for condition in ("loss=remoe", "los=srp", "loss"):
        with pytest.raises(ValueError, match=r"loss=plain\|srp"):
            ablate(grid, "--only", condition)
    with pytest.raises(ValueError, match="--jobs must be at least 1"):
        ablate(grid, "--jobs", "0")


def test_labels_of_one_axis_are_alternatives(folder):
    grid = load_grid(write_grid(seeds=[0, 1, 2]))
    chosen = grid.select(["loss=srp", "seed=0", "seed=2", "width=wide"])
    assert [cell.name for cell in chosen] == ["wide-srp-seed0", "wide-srp-seed2"]


def test_a_folder_of_other_settings_is_neither_reused_nor_overwritten(folder):
    assert ablate(write_grid(), "--only", "width=narrow") == 0
    other = {**GRID["grid"], "width": {"key": "model.width", "values": {"narrow": 9}}}
    with pytest.raises(ValueError, match="narrow-plain-seed0 holds a run made with other overrides"):
        ablate(write_grid(grid=other))
    Path("recipe.yaml").write_text(yaml.safe_dump({**RECIPE, "steps": 3}))
    with pytest.raises(ValueError, match="made with other recipes"):
        ablate(write_grid())
    Path("recipe.yaml").write_text("# a comment changes nothing\n" + yaml.safe_dump(RECIPE))
    assert ablate(write_grid()) == 0
    Path("strange/a-seed0").mkdir(parents=True)
    Path("strange/a-seed0/notes.txt").touch()
    with pytest.raises(ValueError, match="is no cell of an ablation"):
        ablate(write_grid(runs="strange", grid=None, cells=[{"name": "a"}]))


def test_cells_share_a_wandb_group_and_divide_the_threads(folder):
    grid = write_grid()
    assert ablate(grid, "--jobs", "2") == 0
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    for cell in load_grid(grid).cells:
        assert starts(cell.folder)[0].split()[1:] == ["small", str(threads)]
    environment = cell_environment(load_grid(grid), 1, {"PATH": "x"})
    assert "OMP_NUM_THREADS" not in environment
    assert cell_environment(load_grid(grid), 3, {"OMP_NUM_THREADS": "2"})["OMP_NUM_THREADS"] == "1"


def test_a_cell_of_two_jobs_computes_with_its_share_of_the_threads(folder, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    environment = cell_environment(load_grid(write_grid()), 2, os.environ)
    threads = [sys.executable, "-c", "import torch; print(torch.get_num_threads())"]
    assert subprocess.run(threads, env=environment, capture_output=True, text=True, check=True).stdout == "1\n"


def test_resources_of_a_cell_that_make_no_sense_are_refused(folder):
    grid = write_grid()
    for arguments, message in (
        (["--launcher", "ray", "--cpus", "0"], "--cpus must be at least 1, got 0"),
        (["--launcher", "ray", "--gpus", "-1"], "--gpus must be at least 0, got -1"),
        (["--cpus", "2"], "--cpus and --gpus are what a cell gets with --launcher ray"),
    ):
        with pytest.raises(ValueError, match=message):
            ablate(grid, *arguments)


DRIVER = """
import sys
from consistency_reg.lab.ablate import main
sys.exit(main(sys.argv[3:], command=sys.argv[1:3], check=lambda arguments: None))
"""


def start_ablation(*arguments):
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, *STUB, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_until(condition, what, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.02)


def slow_grid():
    Path("recipe.yaml").write_text(yaml.safe_dump({**RECIPE, "steps": 10, "seconds": 0.1}))
    return write_grid()


def in_the_middle():
    finished = len(list(Path("runs/small").glob("*/result.json")))
    return finished == 1 and any(
        3 <= int(reached.read_text() or 0) < 10 for reached in Path("runs/small").glob("*/reached")
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_in_the_middle_and_started_again_it_ends_with_four_cells_none_run_twice(folder, number):
    grid = slow_grid()
    first = start_ablation(grid)
    wait_until(in_the_middle, "the second cell to be half-way")
    interrupted = next(path.parent for path in Path("runs/small").glob("*/reached") if int(path.read_text()) < 10)
    first.send_signal(number)
    first.wait(60)
    assert first.returncode != 0
    again = start_ablation(grid)
    output = again.communicate(timeout=150)[0]
    assert again.returncode == 0, output
    assert len(list(Path("runs/small").glob("*/result.json"))) == 4
    for cell in Path("runs/small").iterdir():
        steps = [line for line in (cell / "log.txt").read_text().splitlines() if line.startswith("step")]
        assert set(steps) == {f"step {step}" for step in range(10)}
        assert len(steps) <= 10 + (cell == interrupted), "a step that was done is not done again"
        assert not (cell / "clash").exists()
        # Killed, the ablation leaves its cell at work: the second waits for it instead of running it again.
        assert len(starts(cell)) == (2 if cell == interrupted and number == signal.SIGTERM else 1)


def test_a_terminated_ablation_ends_its_cells(folder):
    process = start_ablation(slow_grid(), "--jobs", "2")
    wait_until(lambda: len(list(Path("runs/small").glob("*/at_work"))) == 2, "two cells at work")
    process.terminate()
    process.wait(60)
    for cell in Path("runs/small").glob("*/at_work"):
        assert not Path("/proc", cell.read_text()).exists()


def test_two_ablations_of_one_grid_share_its_cells(folder):
    grid = slow_grid()
    processes = [start_ablation(grid) for _ in range(2)]
    outputs = [process.communicate(timeout=150)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert len(list(Path("runs/small").glob("*/result.json"))) == 4
    for cell in Path("runs/small").iterdir():
        assert len(starts(cell)) == 1
        assert not (cell / "clash").exists()
    assert "in another process" in "".join(outputs)


def test_a_sweep_has_the_grids_axes_and_its_agents_run_one_cell(folder):
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    grid = write_grid(seeds=[0, 1])
    assert ablate(grid, "--export-sweep", "out/sweep.yaml") == 0
    assert not Path("runs").exists()
    exported = yaml.safe_load(Path("out/sweep.yaml").read_text())
    assert exported == sweep.sweep(load_grid(grid))
    assert exported["method"] == "grid"
    assert {name: parameter["values"] for name, parameter in exported["parameters"].items()} == {
        "width": ["narrow", "wide"],
        "loss": ["plain", "srp"],
        "seed": [0, 1],
    }
    drawn = {name: {"value": parameter["values"][-1]} for name, parameter in exported["parameters"].items()}
    conditions = create_sweep_command_args({"args": drawn})["args_no_hyphens"]
    assert [cell.name for cell in load_grid(grid).select(conditions)] == ["wide-srp-seed1"]
    assert exported["command"][-2:] == ["--only", "${args_no_hyphens}"]


def test_the_display_tells_the_running_cells_step_loss_perplexity_and_the_remaining_time(folder):
    grid = load_grid(slow_grid())
    lines = io.StringIO()
    with LiveDisplay(1, Console(file=lines, width=200), seconds_between_lines=0.3) as display:
        run_cells(grid, grid.select(["width=wide"]), display, LocalLauncher(STUB), poll_seconds=0.05)
    assert "wide-srp-seed0: running" in lines.getvalue()
    assert re.search(r"train, step \d+/10, loss 4\.000, perplexity 54\.6", lines.getvalue())
    assert re.search(r"1 of 2 cells, \d:\d\d:\d\d so far, \d:\d\d:\d\d remaining", lines.getvalue())

    terminal = io.StringIO()
    with LiveDisplay(1, Console(file=terminal, width=120, force_terminal=True)) as display:
        running = CellState(grid.cells[0], status="running", share=0.5, pace=60.0, line="train, step 5/10, loss 4.0")
        display.update([running, CellState(grid.cells[1])])
    assert "━" in terminal.getvalue()
    assert "train, step 5/10, loss 4.0" in terminal.getvalue()
    assert "0:01:30 remaining" in terminal.getvalue()


def test_the_remaining_time_counts_waiting_cells_and_jobs(folder):
    cells = load_grid(write_grid()).cells
    states = [CellState(cell) for cell in cells]
    assert remaining_seconds(states, 1) is None
    states[0] = CellState(cells[0], status="finished", share=1.0, set_up=10.0, pace=90.0)
    states[1] = CellState(cells[1], status="running", share=0.75, pace=90.0, set_up=10.0)
    assert remaining_seconds(states, 1) == pytest.approx(22.5 + 200)
    assert remaining_seconds(states, 2) == pytest.approx((22.5 + 200) / 2)


TINY = {
    "data": {"domains": ["math"], "corpus_bytes": 60_000, "vocab_size": 300, "sequence_length": 32, "batch_size": 2},
    "model": {
        "model": {"init_args": {"hidden_size": 16, "num_layers": 1, "num_experts": 4, "top_k": 2, "num_heads": 2}},
        "warmup_steps": 0,
    },
    "trainer": {"max_steps": 2},
    "consistency": {"loss": {"init_args": {"segment_lengths": [4]}}},
    "monitor": {"segment_lengths": [4, 16]},
}


def tiny_grid(grid):
    Path("recipe.yaml").write_text(yaml.safe_dump({**TINY, "data": {**TINY["data"], "validation_tokens": 64}}))
    return write_grid(grid=grid)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"weight": {"consistency.wieght": 0.1}}, "wieght"),
        ({"loss": {"consistency.loss": {"class_path": "consistency_reg.NoSuchLoss"}}}, "NoSuchLoss"),
        ({"negative": {"consistency.weight": -1.0}}, "weight"),
        ({"long": {"consistency.loss.init_args.segment_lengths": [64]}}, "sequence_length=32"),
        ({"experts": {"model.model.init_args.shared_experts": 2}}, "shared_experts"),
        ({"short": {"model.warmup_steps": 2}}, "max_steps must be more than warmup_steps=2, got 2"),
    ],
)
def test_what_fit_would_refuse_is_refused_before_any_cell_is_trained(folder, values, named):
    grid = tiny_grid({"loss": {"values": {"fine": {}, **values}}})
    with pytest.raises(ValueError, match=named) as refusal:
        ablate(grid, check=None)
    assert f"cell {next(iter(values))}-seed0" in str(refusal.value)
    assert not Path("runs").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_real_runs_killed_in_the_middle_end_as_four_cells_none_run_twice(number, code, folder):
    weights = {"key": "consistency.weight", "values": {"without": 0.0, "with": 0.1}}
    grid = tiny_grid({"shared": {"key": "model.model.init_args.shared_experts", "values": [0, 1]}, "weight": weights})
    command = [sys.executable, "-m", "consistency_reg", "ablate", str(grid)]
    first = subprocess.Popen(command)
    wait_until(lambda: len(list(Path("runs/small").glob("*/result.json"))) == 2, "two finished cells", seconds=200)
    first.send_signal(number)
    assert first.wait(60) == code
    finished = {path: path.stat().st_mtime_ns for path in Path("runs/small").glob("*/result.json")}
    assert subprocess.run(command, check=False).returncode == 0
    results = {path: path.stat().st_mtime_ns for path in Path("runs/small").glob("*/result.json")}
    assert len(results) == 4
    assert finished.items() <= results.items()
    assert len({(path.parent / "wandb-id").read_text() for path in results}) == 4
