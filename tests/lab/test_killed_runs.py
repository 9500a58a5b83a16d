"""Runs that are killed again and again: each next start goes on within one checkpoint, and no logged row is lost."""

import json
import subprocess
import sys

import pytest
from killed import FILE_SYSTEMS, on_file_system
from places import ROOT

KILLS, EVERY = 50, 4
DRIVER = """
import csv, json, os, random, signal, sys, time
from pathlib import Path

folder, kills, arguments = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
from consistency_reg.lab import train  # once: each run is a fork of this process, which has not trained
moments = random.Random(str(folder.parent.name))
metrics = folder / "metrics.csv"


def rows(path):
    # the whole rows of a file: a last one that was cut off does not count
    text = path.read_bytes()
    return list(csv.DictReader(text[: text.rfind(b"\\n") + 1].decode().splitlines()))


def steps(found, column):
    return [int(row["step"]) for row in found if row.get(column)]


def start():
    child = os.fork()
    if not child:
        out = os.open(os.devnull, os.O_WRONLY)
        os.dup2(out, 1)
        try:
            code = train.main(arguments)
        except BaseException as error:
            (folder.parent / f"error-{os.getpid()}").write_text(repr(error))
            code = 1
        os._exit(code)
    return child


def wait_for_a_step(child):
    # until this session has logged one
    before = metrics.stat().st_ino if metrics.exists() else None
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        try:
            if metrics.stat().st_ino != before and steps(rows(metrics), "train/ce"):
                return True
        except FileNotFoundError:
            pass
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.005)
    raise TimeoutError("no step was logged")


told = []
for kill in range(kills):
    logged = [step for path in folder.glob("metrics*.csv") for step in steps(rows(path), "train/ce")]
    child = start()
    early = kill % 10 == 9  # some are killed before they train, which must change nothing
    if early:
        time.sleep(moments.uniform(0.0, 2.0))
    elif not wait_for_a_step(child):
        sys.exit("the run ended: " + str([path.read_text() for path in folder.parent.glob("error-*")]))
    first = None if early else steps(rows(metrics), "train/ce")[0]
    if not early:
        time.sleep(moments.uniform(0.0, 1.5))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if first is not None:
        told.append({"logged": max(logged, default=-1), "went_on_at": first})
files = sorted(folder.glob("metrics-*.csv"), key=lambda path: int(path.stem[8:])) + [metrics]
every = [row for path in files for row in rows(path)]
print(json.dumps({"sessions": told, "train": steps(every, "train/ce"), "val": steps(every, "val/ce")}))
"""


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", FILE_SYSTEMS)
def test_killed_fifty_times_a_run_goes_on_within_one_checkpoint_and_no_row_is_lost(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("CONSISTENCY_REG_CACHE", str(tmp_path / "cache"))
    options = {
        "data.domains": "[math]",
        "data.corpus_bytes": 60_000,
        "data.vocab_size": 300,
        "data.sequence_length": 32,
        "data.batch_size": 2,
        "data.validation_tokens": 64,
        "model.model.init_args.hidden_size": 16,
        "model.model.init_args.num_layers": 1,
        "model.model.init_args.num_heads": 2,
        "model.warmup_steps": 1,
        "consistency.start_step": 0,
        "consistency.loss.segment_lengths": "[4]",
        "monitor.segment_lengths": "[4]",
        "monitor.cache_ratios": "[1]",
        "trainer.max_steps": 1_000_000,
        "trainer.max_epochs": -1,
        "trainer.val_check_interval": 10,
        "trainer.accelerator": "cpu",
        "trainer.log_every_n_steps": 1,
        "trainer.enable_progress_bar": False,
        "checkpoint_every": EVERY,
        "wandb_project": "",
    }
    with on_file_system(kind, tmp_path) as place:
        run = place / "run"
        arguments = ["--config", str(ROOT / "recipes" / "quickstart.yaml"), "--run_dir", str(run)]
        arguments += [f"--{key}={value}" for key, value in options.items()]
        done = subprocess.run(
            [sys.executable, "-c", DRIVER, str(run), str(KILLS), *arguments], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert len(told["sessions"]) == KILLS - KILLS // 10
    for session in told["sessions"]:
        assert session["logged"] - EVERY < session["went_on_at"] <= session["logged"] + 1, session
    assert set(told["train"]) == set(range(max(told["train"]) + 1))
    last_validation = max(told["val"])
    assert set(told["val"]) == set(range(9, last_validation + 1, 10)), told["val"]
    print(f"{kind}: {len(told['train'])} rows of {max(told['train']) + 1} steps", told["sessions"])
