"""Routing that others recorded: engines' own hits come out access by access, and published figures to the decimal.

Cuts of the files are in tests/data; the whole files are used where they lie beside the repository.
"""

from bisect import bisect_right
from pathlib import Path

import numpy as np
import pytest
import torch
from places import ROOT

from consistency_reg.functional import cache_hit_rate, replay_engine
from consistency_reg.functional.cache_replay import cache_access_hits
from consistency_reg.lab.evaluate.foreign_traces import read_route_csv
from consistency_reg.lab.evaluate.traces import load_trace

CUTS = ROOT / "tests" / "data"
WHOLE = next((up / "shared" / "data" for up in ROOT.parents if (up / "shared" / "data").is_dir()), ROOT / "no data")
MIB = 2**20
GPTOSS, QWEN = CUTS / "gptoss.route.csv.gz", CUTS / "qwen3-30b-a3b-code-layer-24.npz"

whole_files = pytest.mark.skipif(not WHOLE.is_dir(), reason="needs the whole recorded files")


def replayed(path, budget):
    trace = read_route_csv(path)
    engine = {"expert_bytes": trace.expert_bytes, "calls": trace.calls, "routed": trace.routed}
    replay = replay_engine(trace.expert_ids, trace.num_experts, budget, **engine)
    for held, residency in zip(replay.held, trace.residency, strict=True):
        assert torch.equal(held, residency)
    return replay


def read_bytes(path):
    """Bytes that a recorded run read in each step, by its own count."""
    rows = [line.split(",") for line in path.read_text().splitlines() if not line.startswith("#")]
    return [int(row[rows[0].index("read_bytes")]) for row in rows[1:]]


def test_an_engines_cache_is_replayed_to_the_last_access():
    replay = replayed(GPTOSS, 3000 * MIB)
    assert (replay.hits, replay.misses) == (295, 2336)


@whole_files
@pytest.mark.parametrize(
    ("name", "budget", "hit_rate"), [("qwen", 4000, 74.88), ("gemma", 4000, 76.78), ("gptoss", 3000, 32.41)]
)
def test_the_hit_rates_that_engines_logged(name, budget, hit_rate):
    folder = WHOLE / "engine-traces"
    replay = replayed(folder / f"{name}.route.csv.gz", budget * MIB)
    assert round(100 * replay.hit_rate, 2) == hit_rate
    trace = read_route_csv(folder / f"{name}.route.csv.gz")
    first = int((trace.calls == trace.calls[0]).sum())
    decoded = sum(
        int((asked & ~held)[first:].sum()) * size
        for asked, held, size in zip(replay.looked_up, replay.held, trace.expert_bytes, strict=True)
    )
    logged = sum(read_bytes(folder / f"{name}.metrics.csv"))
    assert decoded == pytest.approx(logged, rel=0.01)


def published_simulator(ids, slots, policy):
    """Hit rate by access where uses are dated by token, as the source of the Qwen3 traces counts.

    Experts of one token are equally recent, and Belady looks for uses after the present token: it may evict an expert
    that the present token has yet to look up. Of equals the lower id is evicted.
    """
    tokens_of, last, cache, hits = {}, {}, set(), 0
    for t, token in enumerate(ids):
        for e in token:
            tokens_of.setdefault(e, []).append(t)

    def next_use(e, t):
        later = bisect_right(tokens_of[e], t)
        return tokens_of[e][later] if later < len(tokens_of[e]) else float("inf")

    for t, token in enumerate(ids):
        for e in token:
            hits += e in cache
            if e not in cache and len(cache) == slots:
                if policy == "lru":
                    cache.remove(min(cache, key=lambda x: (last[x], x)))
                else:
                    cache.remove(max(cache, key=lambda x: (next_use(x, t), -x)))
            cache.add(e)
            last[e] = t
    return hits / (len(ids) * len(ids[0]))


SLOTS = 17  # 13.4% of 128 experts


@whole_files
@pytest.mark.parametrize(("policy", "published"), [("lru", 65.9), ("belady", 79.1)])
def test_published_figures_of_qwen3_that_date_uses_by_token(policy, published):
    ids = load_trace(WHOLE / "qwen3-30b-a3b" / "code.npz").expert_ids[24][0].tolist()
    assert round(100 * published_simulator(ids, SLOTS, policy), 1) == published


@whole_files
def test_published_figures_of_qwen3_by_access():
    """LFU and the static set as published; LRU and Belady beside the published ones, which date uses by token."""
    ids = load_trace(WHOLE / "qwen3-30b-a3b" / "code.npz").expert_ids[24].long()
    rates = {}
    for policy in ("lru", "lfu", "belady"):
        (hits,) = cache_access_hits(ids, 128, SLOTS, policy, replay="access", cold="miss")
        rates[policy] = round(100 * float(hits.double().mean()), 1)
    assert rates == {"lru": 65.6, "lfu": 60.1, "belady": 81.1}
    warm_up = torch.bincount(ids[:, :1600].flatten(), minlength=128)
    (static,) = cache_access_hits(ids, 128, SLOTS, "fixed", usage=warm_up)
    assert round(100 * float(static.double().mean()), 1) == 59.2


def test_the_two_replays_of_real_routing_differ():
    ids = load_trace(QWEN).expert_ids[0].long()
    by_token, by_access = (
        cache_hit_rate(ids, 128, "lru", replay=replay, cold="miss") for replay in ("token", "access")
    )
    assert float(by_token[7]) > 1.2 * float(by_access[7])
    for slots in (8, SLOTS):
        for replay, rates in (("token", by_token), ("access", by_access)):
            (hits,) = cache_access_hits(ids, 128, slots, "lru", replay=replay, cold="miss")
            assert float(hits.double().mean()) == pytest.approx(float(rates[slots - 1]), abs=1e-12)


def test_an_array_of_ids_is_one_stream():
    recording = load_trace(QWEN)
    assert recording.model == "Qwen3-30B-A3B-Q4_K_M"
    assert (recording.num_experts, recording.tokens, recording.longest_document) == ([128], 1000, 1000)
    assert recording.domains == ["qwen3-30b-a3b-code-layer-24"]
    assert recording.expert_ids[0].shape == (1, 1000, 8)


def test_a_route_trace_is_a_recording():
    recording = load_trace(GPTOSS)
    assert recording.model == "gpt-oss-120b-Q4_K_M.gguf"
    assert (len(recording.expert_ids), recording.tokens) == (35, 97)  # the last layer skipped most of the prompt
    assert next(iter(recording.about.values())) == ["layer_35"]
    assert recording.about["dense_bytes"] == 828131328
    assert recording.num_experts == [128] * 35
    assert recording.expert_bytes == [13219200] * 35
    assert recording.layer_names[:2] == ["layer_00", "layer_01"]
    assert recording.domains == ["gptoss"]


HEADER = "# route_trace v1\n# model=/tmp/toy.gguf n_expert=4\n# layer=3 expert_bytes=10\n# layer=7 expert_bytes=20\n"
ROWS = (
    "turn,phase,step,layer,slot,expert\n0,0,0,3,0,1\n0,0,0,7,0,2\n0,0,1,3,0,0\n0,0,1,7,0,2\n1,1,0,3,0,3\n1,1,0,7,0,1\n"
)


def written(path, text):
    path.write_text(text)
    return path


def test_layers_turns_and_calls(tmp_path):
    trace = read_route_csv(written(tmp_path / "a.csv", HEADER + ROWS))
    assert [ids.flatten().tolist() for ids in trace.expert_ids] == [[1, 0, 3], [2, 2, 1]]
    assert (trace.layer_names, trace.expert_bytes, trace.num_experts) == (["layer_03", "layer_07"], [10, 20], [4, 4])
    assert trace.document_ids.tolist() == [0, 0, 1]
    assert trace.calls.tolist() == [0, 0, 1]
    assert trace.residency is None
    assert load_trace(tmp_path / "a.csv").document_ids.tolist() == [[0, 0, 1]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "first line must be '# route_trace v1', got"),
        ("turn,phase\n", "first line must be '# route_trace v1', got"),
        (HEADER, r"must have rows with the columns .* but lacks"),
        (HEADER + "turn,phase,step,layer,slot\n0,0,0,0,0\n", r"but lacks \['expert'\]"),
        (HEADER + ROWS.replace("1,1,0,3,0,3\n", ""), r"the slots 0\.\.0 of layer 3 once for each token"),
        (HEADER + ROWS + "1,1,0,3,0,2\n", r"the slots 0\.\.0 of layer 3 once for each token"),
        (HEADER + ROWS + "1,1,0,3,1,2\n", r"the slots 0\.\.1 of layer 3 once for each token"),
        (HEADER + ROWS.replace("7,0,1\n", "7,0,x\n"), "whole numbers as 'expert'"),
        (HEADER + ROWS.replace("7,0,1\n", "7,0\n"), "whole numbers as 'expert'"),
        (HEADER + ROWS.replace("7,0,1\n", f"7,0,{2**64}\n"), "whole numbers as 'expert'"),
        (HEADER + ROWS.replace("7,0,1\n", "7,-1,1\n"), "numbers of 0 or more as 'slot'"),
        (HEADER.replace("n_expert=4", "n_expert=four") + ROWS, "must have a whole number as 'n_expert', got 'four'"),
        (HEADER + ROWS.replace("7,0,1\n", "7,0,4\n"), r"must lie in 0\.\.3"),
        (HEADER.replace("expert_bytes=10", "expert_bytes=0") + ROWS, "expert_bytes must be whole numbers from 1 to"),
    ],
)
def test_a_csv_that_is_no_route_trace_is_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as raised:
        load_trace(written(tmp_path / "bad.csv", text))
    assert "bad.csv" in str(raised.value)


def test_a_truncated_file_is_named(tmp_path):
    whole = GPTOSS.read_bytes()
    (tmp_path / "cut.csv.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.csv\.gz is no whole route trace"):
        load_trace(tmp_path / "cut.csv.gz")
    (tmp_path / "plain.csv.gz").write_text("no archive")
    with pytest.raises(ValueError, match=r"plain\.csv\.gz is no whole route trace"):
        load_trace(tmp_path / "plain.csv.gz")
    (tmp_path / "cut.npz").write_bytes(QWEN.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"cut\.npz is no whole file of arrays"):
        load_trace(tmp_path / "cut.npz")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"other": np.zeros(3)}, "must hold the array 'experts'"),
        ({"experts": np.zeros((1, 2, 3))}, "must hold integers 'experts'"),
        ({"experts": np.zeros((2, 3), dtype=np.int16)}, "must hold integers 'experts'"),
        ({"experts": np.array([[[0, 0], [1, 2]]])}, "must not repeat an expert"),
        (
            {"experts": np.array([[[0, 1]]]), "meta": '{"num_experts": [2]}'},
            r"whole number as 'num_experts', got \[2\]",
        ),
        ({"experts": np.array([[[0, 1]]]), "meta": "{"}, "must hold JSON as 'meta'"),
        ({"experts": np.array([[[0, 1]]]), "meta": "[1]"}, "must hold a JSON object as 'meta'"),
        ({"experts": np.array([[[0, 1]]], dtype=object)}, "no whole file of arrays"),
    ],
)
def test_an_npz_that_is_no_routing_is_named(tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        load_trace(tmp_path / "bad.npz")


def test_the_cuts_are_small_and_say_where_they_come_from():
    note = (CUTS / "README.md").read_text()
    for path in CUTS.iterdir():
        assert path.stat().st_size < 40_000
        assert path.name == "README.md" or path.name in note
    assert Path(ROOT / "LICENSE").read_text().lstrip().startswith("Apache License")
