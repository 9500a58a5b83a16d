"""Ablations on a real Ray cluster: cells end, are not run twice, and fail by name."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from places import STUB_FIT

pytest.importorskip("ray")

STUB = (sys.executable, str(STUB_FIT))
DRIVER = """
import sys
import ray
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
from consistency_reg.lab.ablate import main
sys.exit(main(sys.argv[3:], command=sys.argv[1:3], check=lambda arguments: None))
"""
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    return tmp_path


def grid(steps=2, seconds=0.0, **values):
    Path("recipe.yaml").write_text(yaml.safe_dump({"steps": steps, "seconds": seconds}))
    axes = {
        "width": {"key": "width", "values": {"narrow": 8, "wide": 16}},
        "loss": {"key": "loss", "values": ["a", "b"]},
    }
    Path("grid.yaml").write_text(yaml.safe_dump({"recipe": "recipe.yaml", "runs": "runs", "grid": values or axes}))
    return "grid.yaml"


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, *STUB, *arguments, "--launcher", "ray"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished():
    return {path.parent.name for path in Path("runs").glob("*/result.json")}


def starts(cell):
    return Path(cell, "starts.txt").read_text().splitlines()


def test_four_cells_end_on_the_cluster_and_a_failing_one_is_reported(folder):
    process = start(grid())
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert "4 cells run, 0 finished before, 0 failed" in output
    assert len(finished()) == 4
    for cell in Path("runs").iterdir():
        assert [line.split()[1:] for line in starts(cell)] == [["runs", "1"]], "one wandb group, one thread a CPU"
    values = {"fail": {"key": "fail", "values": {"early": 0, "never": 99}}, "kill": {"key": "kill", "values": [99]}}
    Path("runs").rename("before")
    process = start(grid(**values))
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 1
    assert "1 cells run, 0 finished before, 1 failed" in output
    assert "early-99-seed0 failed: exit code 1" in output
    assert "no memory left at step 0" in output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_in_the_middle_and_started_again_it_ends_with_four_cells_none_run_twice(folder, number):
    first = start(grid(steps=10, seconds=0.3), "--jobs", "1")
    deadline = time.monotonic() + 200
    while not finished() or len(list(Path("runs").glob("*/reached"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    before = {cell: (Path("runs", cell, "result.json").stat().st_mtime_ns) for cell in finished()}
    first.send_signal(number)
    first.wait(100)
    again = start("grid.yaml")
    output = again.communicate(timeout=300)[0]
    assert again.returncode == 0, output
    assert len(finished()) == 4
    for cell, written in before.items():
        assert Path("runs", cell, "result.json").stat().st_mtime_ns == written
        assert len(starts(Path("runs", cell))) == 1
    for cell in Path("runs").iterdir():
        assert not (cell / "clash").exists()
        steps = [line for line in (cell / "log.txt").read_text().splitlines() if line.startswith("step")]
        assert set(steps) == {f"step {step}" for step in range(10)}
        assert len(steps) <= 11, "a step that was done is not done again"


def test_a_cell_that_no_machine_has_room_for_is_refused(folder):
    process = start(grid(), "--cpus", "64")
    output = process.communicate(timeout=300)[0]
    assert process.returncode != 0
    assert "must have 64 CPUs and 0 GPUs for a cell, got 2 CPUs, 0 GPUs" in output
    assert not finished()
