"""What fits within a memory budget and how fast that is: against engines' own counts, and against counting by hand."""

import csv
import json
from dataclasses import replace

import pytest
import torch
from places import ROOT
from tiny_models import tiny_model

from consistency_reg.functional import replay_engine
from consistency_reg.lab.cli import main
from consistency_reg.lab.evaluate.foreign_traces import read_route_csv
from consistency_reg.lab.evaluate.memory import Device, Needs, Within, about_memory, kv_elements_per_token
from consistency_reg.lab.evaluate.records import usage_lines
from consistency_reg.lab.evaluate.traces import Recording, load_trace

CUTS = ROOT / "tests" / "data"
GPTOSS = CUTS / "gptoss.route.csv.gz"
MIB = 2**20


@pytest.fixture
def recording():
    """Two layers of 4 experts, 2 active, of 100 and 300 bytes: the last expert of each token alternates."""
    tokens = torch.tensor([[[0, 1], [0, 2], [0, 1], [0, 2]]])
    return Recording(
        model="small",
        expert_ids=[tokens.to(torch.uint8), tokens.to(torch.uint8)],
        num_experts=[4, 4],
        layer_names=["one", "two"],
        valid=torch.ones(1, 4, dtype=torch.bool),
        domain_ids=torch.zeros(1, dtype=torch.int64),
        domains=["text"],
        expert_bytes=[100, 300],
        about={
            "weight_bytes": 4 * 400 + 1000,
            "weight_itemsize": 4,
            "kv_elements_per_token": 5,
            "moe_layers": 2,
            "sequence_length": 10,
        },
    )


def test_it_predicts_what_an_engine_read_in_each_step_within_one_percent():
    trace = read_route_csv(GPTOSS)
    engine = {"expert_bytes": trace.expert_bytes, "calls": trace.calls, "routed": trace.routed}
    replay = replay_engine(trace.expert_ids, trace.num_experts, 3000 * MIB, **engine)
    prompt, *decoded = replay.bytes_of_calls(trace.expert_bytes, trace.calls).tolist()
    logged = [int(row["read_bytes"]) for row in csv.DictReader((CUTS / "gptoss.metrics.csv").open())]
    assert len(logged) == 12
    assert decoded == pytest.approx(logged, rel=0.01)
    assert prompt + sum(decoded) == replay.bytes_read


def test_slots_fit_beside_other_weights_and_the_kv_cache(recording):
    needs = Needs(recording, Device([0], bandwidth=1))
    assert (needs.dense_bytes, needs.kv_bytes) == (1000, 5 * 4 * 10)
    assert needs.slots(1200 + 2 * 400) == 2
    assert needs.slots(1200 + 2 * 400 - 1) == 1
    assert needs.memory(3) == 1200 + 3 * 400


def test_the_bytes_of_a_model_are_those_of_its_parameters():
    model = tiny_model("olmoe")
    found = about_memory(model)
    config = model.config
    heads, size = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    assert found["weight_bytes"] == sum(p.numel() * 4 for p in model.parameters())
    assert found["kv_elements_per_token"] == 2 * config.num_hidden_layers * heads * size


def test_a_quantization_shrinks_weights_and_not_the_kv_cache(recording):
    needs = Needs(recording, Device([0], bandwidth=1, bytes_per_weight=0.5, context=100))
    assert needs.expert_bytes == [12, 38]
    assert needs.dense_bytes == 125
    assert needs.kv_bytes == 5 * 2 * 100


def test_misses_become_bytes_and_bytes_become_tokens_per_second(recording):
    two, three, none = (
        Within(recording, Device([1200 + 2 * 400, 1200 + 3 * 400, 1200 + 399], 1000, compute_seconds=0.05)).rows()[1:]
        + Within(recording, Device([1500], 1000)).rows()
    )
    assert (two["slots"], three["slots"]) == (2, 3)
    assert two["misses"] == pytest.approx(2 * (2 + 1 + 1 + 1) / 4)  # expert 0 stays, the other alternates
    assert two["loaded_bytes"] == pytest.approx(400 * 5 / 4)
    assert two["tokens_per_s"] == pytest.approx(1 / (0.05 + 500 / 1000))
    assert three["loaded_bytes"] == pytest.approx(400 * 3 / 4)  # first uses alone
    assert two["twice_tokens_per_s"] == pytest.approx(three["tokens_per_s"])
    assert "tokens_per_s" not in none
    assert none["advice"] == "needs 2 kB"


@pytest.mark.parametrize(("cycle", "advice"), [(5, "working set"), (9, "policy")])
def test_policy_or_working_set(recording, cycle, advice):
    """Expert 0 and one of a cycle: twice the slots hold a short cycle, and of a long one Belady alone keeps a part."""
    tokens = torch.tensor([[[0, 1 + t % cycle] for t in range(200)]]).to(torch.uint8)
    of_layers = {"expert_ids": [tokens, tokens], "num_experts": [16, 16], "valid": torch.ones(1, 200, dtype=torch.bool)}
    cycling = replace(recording, **of_layers, about=recording.about | {"dense_bytes": 1000})
    needed = Needs(cycling, Device([0], 1)).memory(4)
    (row,) = Within(cycling, Device([needed], 1000)).rows()
    assert row["advice"] == advice
    assert row["cliff_slots"] == 2


def test_below_the_cliff_and_everything(recording):
    below, whole = Within(recording, Device([1200 + 2 * 400, 10**6], 1000)).rows()
    assert (below["advice"], whole["advice"]) == ("below the cliff", "everything fits")


def test_a_usage_profile_is_read_back():
    recording = load_trace(GPTOSS)
    counts = [torch.zeros(E, dtype=torch.int64) for E in recording.num_experts]
    for line in usage_lines(recording).splitlines():
        layer, expert, count = map(int, line.split())
        counts[layer][expert] = count
    for found, ids in zip(counts, recording.expert_ids, strict=True):
        assert found.equal(torch.bincount(ids[recording.valid].flatten().long(), minlength=len(found)))
        assert int(found.sum()) == recording.tokens * ids.shape[-1]


def test_the_command_predicts_and_writes(tmp_path, capsys):
    command = ["evaluate", "--trace", str(CUTS / "qwen3-30b-a3b-code-layer-24.npz")]
    small = ["--segment-lengths", "4", "--replicates", "0", "--out", str(tmp_path / "out")]
    within = ["--memory", "3GB", "--read-bandwidth", "1.5GB/s"]
    assert main([*command, *small, *within]) != 0
    assert "--memory needs the bytes of an expert" in capsys.readouterr().err
    command[2] = str(GPTOSS)
    profile = tmp_path / "usage.txt"
    more = ["--no-shared-cache", "--compute-ms", "80", "--usage-profile", str(profile)]
    assert main([*command, *small, *within, *more]) == 0
    assert "Within a memory budget" in capsys.readouterr().out
    (row,) = csv.DictReader((tmp_path / "out" / "memory.csv").open())
    assert row["slots"] == "4"
    (told,) = json.loads((tmp_path / "out" / "evaluation.json").read_text())["memory"]
    assert told["tokens_per_s"] == pytest.approx(float(row["tokens_per_s"]))
    assert told["tokens_per_s"] == pytest.approx(1 / (0.08 + told["loaded_bytes"] / 1.5e9))
    assert (tmp_path / "out" / "memory.png").stat().st_size > 1000
    assert len(profile.read_text().splitlines()) == sum(load_trace(GPTOSS).num_experts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--memory", "8GB"], "--memory and --read-bandwidth go together"),
        (["--read-bandwidth", "1GB/s"], "--memory and --read-bandwidth go together"),
        (["--compute-ms", "80"], "--memory and --read-bandwidth go together"),
        (["--memory", "much", "--read-bandwidth", "1GB/s"], "--memory must be a positive number of bytes"),
        (["--memory", "8GB", "--read-bandwidth", "0"], "--read-bandwidth must be a positive number of bytes"),
        (
            ["--memory", "8GB", "--read-bandwidth", "1GB", "--compute-ms", "-1"],
            "--compute-ms must be a positive number",
        ),
        (["--memory", "8GB", "--read-bandwidth", "1GB", "--bytes-per-weight", "0.5"], "the dtype of the weights"),
    ],
)
def test_bad_input(options, message, tmp_path, capsys):
    assert main(["evaluate", "--trace", str(GPTOSS), "--out", str(tmp_path), *options]) != 0
    assert message in capsys.readouterr().err


def test_a_latent_kv_cache_is_smaller():
    class Config:
        num_hidden_layers, kv_lora_rank, qk_rope_head_dim = 3, 8, 2

    assert kv_elements_per_token(Config()) == 30
