"""``consistency-reg offload``: what it prints, what it writes, and what it refuses."""

import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from offloading import save
from places import ROOT
from tiny_models import COMMON, E, K
from tokenizers import Tokenizer, models, pre_tokenizers
from wandb_file import read_run

from consistency_reg.lab.cli import main
from consistency_reg.lab.offload.decoding import read_text, sampler, write_text
from consistency_reg.lab.offload.measure import quantiles
from consistency_reg.offload import OffloadedExperts
from consistency_reg.offload.reading import FileReader

WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "mat", "road", "and", "then", "far"]


def with_tokenizer(folder):
    """Give a model a tokenizer whose every word is a token."""
    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {word: 3 + number for number, word in enumerate(WORDS)}
    vocabulary |= {f"w{number}": number for number in range(len(vocabulary), COMMON["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("offload")
    return [with_tokenizer(save(place / name, "granite_moe_shared")) for name in ("baseline", "regularized")]


@pytest.fixture
def prompt(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("the cat sat on the mat and then the dog ran far on a road the cat ran and the dog sat")
    return path


def test_models_are_compared_side_by_side(folders, prompt, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["offload", *folders, "--prompt", str(prompt), "--tokens", "9", "--slots", "3", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "regularized, prompt 1: 9 tokens" in shown
    assert "the cat sat on the mat" in shown
    found = json.loads((out / "offload.json").read_text())
    assert [model["model"] for model in found["models"]] == ["baseline", "regularized"]
    assert found["command"].startswith("consistency-reg offload ")
    one = found["models"][0]
    numbers = one["numbers"]
    assert one["slots"] == [3, 3]
    assert one["slot_bytes"] == (2 * 3 + 4) * one["expert_bytes"][0]
    assert numbers["tokens"] == 9
    assert numbers["p50_ms"] <= numbers["p95_ms"] <= numbers["p99_ms"]
    assert 0 <= numbers["waiting_share"] < 1
    rows = list(csv.DictReader((out / "tokens.csv").open()))
    assert len(rows) == 2 * 9
    mine = [row for row in rows if row["model"] == "baseline"]
    assert all(int(row["hits"]) + int(row["misses"]) == 2 * K for row in mine)
    assert all(int(row["bytes_read"]) == int(row["misses"]) * one["expert_bytes"][0] for row in mine)
    misses = sum(int(row["misses"]) for row in mine)
    assert numbers["hit_rate"] == pytest.approx(1 - misses / (9 * 2 * K))
    assert numbers["decode_tokens_per_s"] == pytest.approx(9e3 / sum(float(row["ms"]) for row in mine))
    assert (out / "token_time.png").read_bytes().startswith(b"\x89PNG")


def test_both_models_of_the_same_weights_write_the_same_text_whatever_the_budget(folders, prompt, tmp_path):
    texts = []
    for budget in (["--slots", "2"], ["--cache-ratio", "4"], ["--memory", "1GB", "--spread", "shared"]):
        out = tmp_path / budget[-1]
        assert main(["offload", folders[0], "--prompt", str(prompt), "--tokens", "8", *budget, "--out", str(out)]) == 0
        texts.append(json.loads((out / "offload.json").read_text())["models"][0]["texts"])
    assert texts[0] == texts[1] == texts[2]


def test_with_the_bias_there_are_fewer_misses_and_the_slots_are_those_that_it_sees(folders, prompt, tmp_path):
    options = [
        "--prompt",
        str(prompt),
        "--read",
        "--cache-aware",
        "0,2",
        "--slots",
        "3",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(["offload", folders[0], *options]) == 0
    without, biased = json.loads((tmp_path / "out" / "offload.json").read_text())["models"]
    assert biased["model"] == "baseline + bias 2"
    assert biased["numbers"]["misses_per_token"] < 0.8 * without["numbers"]["misses_per_token"]
    assert biased["numbers"]["perplexity"] != without["numbers"]["perplexity"]


def test_a_model_that_was_trained_with_the_bias_has_it(folders, prompt, tmp_path):
    trained = tmp_path / "trained"
    shutil.copytree(folders[0], trained)
    config = json.loads((trained / "config.json").read_text())
    deployment = {"strength": 0.2, "cache_ratio": 2.0, "guaranteed": 1, "method": "prior"}
    (trained / "config.json").write_text(json.dumps(config | {"cache_aware_routing": deployment}))
    command = ["offload", str(trained), "--prompt", str(prompt), "--tokens", "3", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    assert json.loads((tmp_path / "out" / "offload.json").read_text())["models"][0]["model"] == "trained + bias 0.2"


def test_slots_go_to_the_layers_where_hits_are(folders, prompt, tmp_path):
    out = tmp_path / "out"
    command = ["offload", folders[0], "--prompt", str(prompt), "--tokens", "20", "--slots", "4", "--out", str(out)]
    assert main(command) == 0
    equal = json.loads((out / "offload.json").read_text())["models"][0]
    assert main([*command, "--spread", "auto"]) == 0
    spread = json.loads((out / "offload.json").read_text())["models"][0]
    assert sum(spread["slots"]) <= 8
    assert min(spread["slots"]) >= K
    assert spread["slot_bytes"] <= equal["slot_bytes"]
    assert spread["texts"] == equal["texts"]


def test_a_calibration_predicts(folders, prompt, tmp_path, capsys):
    out = tmp_path / "out"
    assert (
        main(["offload", folders[0], "--prompt", str(prompt), "--tokens", "5", "--calibrate", "--out", str(out)]) == 0
    )
    assert "predicted tokens/s" in capsys.readouterr().out
    one = json.loads((out / "offload.json").read_text())["models"][0]
    measured = one["calibration"]
    seconds = (
        measured["compute_seconds"]
        + one["numbers"]["misses_per_token"] * measured["expert_bytes"] / measured["bandwidth"]
    )
    assert one["numbers"]["predicted_tokens_per_s"] == pytest.approx(1 / seconds)


def test_a_run_of_wandb_for_each_model(folders, prompt, tmp_path):
    out = tmp_path / "out"
    command = ["offload", folders[0], "--prompt", str(prompt), "--tokens", "3", "--wandb", "tests", "--out", str(out)]
    assert main(command) == 0
    run = read_run(out)
    (row,) = run.history
    assert run.name == "baseline"
    assert row["offload/decode_tokens_per_s"] > 0
    assert len(run.table("offload/tokens")["data"]) == 3
    assert run.images("offload/token_time")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens", "0"], "--tokens must be at least 1, got 0"),
        (["--slots", "3", "--memory", "1GB"], "--memory and --slots are budgets: give one"),
        (["--slots", "1"], f"slots must be at least {K}, the experts that are active per token, got 1"),
        (["--memory", "1kB"], "memory must be at least"),
        (["--cache-aware", "-1"], "--cache-aware must be 0 or more, got [-1.0]"),
        (["--temperature", "-1"], "--temperature must be 0 or more"),
        (["--tokens", "500"], "reads 128 tokens, and a prompt of"),
        (["--tokens", "500", "--spread", "auto"], "reads 128 tokens, and a prompt of"),
        (["--device", "cuda:9"], "device cuda:9 is not there"),
        (["--spread", "shared", "--policy", "belady"], "policy must be one of ('lru', 'lfu', 'fixed')"),
        (["--prompt", "nowhere.txt"], "nowhere.txt: No such file or directory"),
    ],
)
def test_what_is_refused_before_anything_is_read(folders, options, message, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.delattr(FileReader, "read_into")
    assert main(["offload", folders[0], *options, "--out", str(out)]) == 1
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_the_bias_and_slots_that_differ_are_refused_before_the_first_strength(folders, tmp_path, capsys, monkeypatch):
    curves = [[1.0] * E, [float(size) for size in range(E)]]
    monkeypatch.setattr("consistency_reg.lab.offload.run._curves", lambda *_: curves)
    options = ["--spread", "auto", "--cache-aware", "0,0.1", "--tokens", "2", "--out", str(tmp_path / "out")]
    assert main(["offload", folders[0], *options]) == 1
    shown = capsys.readouterr()
    assert "--cache-aware needs the same number of slots in every layer, got [" in shown.err
    assert "tokens/s" not in shown.out


def test_prompts_that_are_too_short(folders, tmp_path, capsys):
    path = tmp_path / "prompt.txt"
    path.write_text(" ")
    assert main(["offload", folders[0], "--prompt", str(path)]) == 1
    assert "--prompt must be a file with text" in capsys.readouterr().err
    path.write_text("cat")
    assert main(["offload", folders[0], "--prompt", str(path), "--out", str(tmp_path / "out")]) == 1
    assert "a prompt must have at least 2 tokens" in capsys.readouterr().err
    path.write_text("cat sat on the mat")
    assert main(["offload", folders[0], "--prompt", str(path), "--read", "--out", str(tmp_path / "out")]) == 1
    assert "--read needs texts of more than 17 tokens" in capsys.readouterr().err


def test_a_folder_without_a_model(tmp_path, capsys):
    assert main(["offload", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "must hold a model" in capsys.readouterr().err


def test_reading_a_text_gives_the_losses_of_one_pass(folders):
    ids = torch.randint(3, COMMON["vocab_size"], (30,), generator=torch.Generator().manual_seed(0))
    offloaded = OffloadedExperts(folders[0])
    with offloaded as model, torch.no_grad():
        done = read_text(offloaded, ids, prompt_tokens=10)
        logits = model(ids[None]).logits[0, 9:-1]
        expected = torch.nn.functional.cross_entropy(logits, ids[10:], reduction="none")
    assert torch.tensor(done.losses) == pytest.approx(expected, abs=1e-4)
    assert done.prefill.tokens == 10
    assert [step.tokens for step in done.steps] == [1] * 20


def test_a_passage_is_repeatable(folders):
    prompt = torch.tensor([5, 6, 7])
    offloaded = OffloadedExperts(folders[0], slots=E)
    with offloaded:
        first, second = (write_text(offloaded, prompt, 12, sampler(1.0, seed=3)) for _ in range(2))
    assert first.ids == second.ids
    assert [step.misses for step in first.steps] == [step.misses for step in second.steps]


@pytest.mark.parametrize(
    "stop", [signal.SIGTERM, *(pytest.param(stop, marks=pytest.mark.slow) for stop in (signal.SIGINT, signal.SIGKILL))]
)
def test_a_stopped_command_leaves_nothing_half_written(folders, prompt, tmp_path, stop):
    out = tmp_path / "out"
    options = ["--prompt", str(prompt), "--tokens", "100", "--read-bandwidth", "20kB", "--out", str(out)]
    command = [sys.executable, "-m", "consistency_reg", "offload", folders[0], *options]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not reads(process.pid, Path(folders[0])):
        time.sleep(0.1)
        assert process.poll() is None, process.stderr.read()
    process.send_signal(stop)
    said = process.communicate(timeout=60)[1]
    assert process.returncode in (-stop, 128 + stop)
    assert "Traceback" not in said
    assert not out.exists()


def reads(process, folder):
    """Whether a process has a model's weights open."""
    with contextlib.suppress(OSError):
        opened = [os.path.realpath(link) for link in Path(f"/proc/{process}/fd").iterdir()]
        return any(path.startswith(str(folder)) and path.endswith(".safetensors") for path in opened)
    return False


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda file: file.write_bytes(file.read_bytes() + b"x"), "has changed since it was opened"),
        (lambda file: os.truncate(file, 5000), "has changed since it was opened"),
    ],
    ids=["grows", "is cut"],
)
def test_a_file_that_changes_meanwhile_is_one_error(folders, prompt, tmp_path, monkeypatch, capsys, spoil, message):
    place, out, read_into, reads = tmp_path / "model", tmp_path / "out", FileReader.read_into, []
    shutil.copytree(folders[0], place)

    def spoiled(reader, destination, offset):
        reads.append(offset)
        if len(reads) == 60:
            spoil(reader.path)
        read_into(reader, destination, offset)

    monkeypatch.setattr(FileReader, "read_into", spoiled)
    assert main(["offload", str(place), "--prompt", str(prompt), "--tokens", "50", "--out", str(out)]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"consistency-reg: error: {place}")
    assert message in last
    assert not out.exists()


def test_a_full_disk_is_one_error(folders, prompt, tmp_path, monkeypatch, capsys):
    def full(path, content):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("consistency_reg.lab.offload.command.write_atomically", full)
    out = tmp_path / "out"
    assert main(["offload", folders[0], "--prompt", str(prompt), "--tokens", "2", "--out", str(out)]) == 1
    assert capsys.readouterr().err.endswith("offload.json: No space left on device\n")


def test_quantiles_of_nothing():
    assert all(value != value for value in quantiles([]))
