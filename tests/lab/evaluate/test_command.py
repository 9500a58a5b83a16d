"""The evaluate command: from models, run folders and saved routing to numbers, advice, tables and files."""

import csv
import io
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import wandb
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import COMMON, E, K, configs, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from wandb_file import read_run

from consistency_reg import functional
from consistency_reg.capture import RouterCapture
from consistency_reg.functional.specialization import grouped_usage
from consistency_reg.lab.evaluate.advice import choose, knee_ratio
from consistency_reg.lab.evaluate.command import main
from consistency_reg.lab.evaluate.figures import figures
from consistency_reg.lab.evaluate.measure import measure
from consistency_reg.lab.evaluate.models import Candidate, expert_bytes, load
from consistency_reg.lab.evaluate.records import to_csv, to_json
from consistency_reg.lab.evaluate.run import in_batches, record
from consistency_reg.lab.evaluate.tables import tables
from consistency_reg.lab.evaluate.text import cut
from consistency_reg.lab.evaluate.traces import load_trace, save_trace
from consistency_reg.lab.knee import knee
from consistency_reg.lab.render.table import in_bytes
from consistency_reg.metrics.simulated_caches import CacheHitRates, ModelHitRates
from consistency_reg.tracking.accumulate import RoutingMeasures

PNG = b"\x89PNG"
WORDS = [f"w{i}" for i in range(3, COMMON["vocab_size"])]


def tokenizer():
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{word: i for i, word in enumerate(WORDS, start=3)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def save_model(folder, model):
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def tiny_switch():
    torch.manual_seed(0)
    config = transformers.SwitchTransformersConfig(
        vocab_size=COMMON["vocab_size"],
        **{"d_model": 32, "d_kv": 8, "d_ff": 16, "num_heads": 2, "num_layers": 2, "num_decoder_layers": 2},
        **{"num_experts": E, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
        expert_capacity=3,
    )
    return transformers.AutoModelForSeq2SeqLM.from_config(config)


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model of each kind, and a data set."""
    folder = tmp_path_factory.mktemp("evaluate")
    for kind in ("olmoe", "deepseek_v3"):
        save_model(folder / kind, tiny_model(kind))
    save_model(folder / "switch", tiny_switch())
    chosen = random.Random(0)
    with open(folder / "words.jsonl", "w") as file:
        for length in (90, 40, 3, 70, 25, 60, 33, 80):
            print(json.dumps({"text": " ".join(chosen.choices(WORDS, k=length)), "other": 1}), file=file)
    (folder / "numbers.jsonl").write_text('{"a": 1, "b": 2}\n')
    (folder / "latin.txt").write_bytes("w3\ncaf\xe9".encode("latin-1"))
    (folder / "latin.jsonl").write_bytes('{"text": "caf\xe9"}\n{"text": "w3"}\n'.encode("latin-1"))
    (folder / "empty.jsonl").write_text('{"text": ""}\n{"text": "  "}\n')
    return folder


def evaluate(place, *arguments, models=("olmoe",), data="words.jsonl", out=None):
    """Run the command on models and data of ``place``; the content of its JSON."""
    folder = out or place / "out"
    shutil.rmtree(folder, ignore_errors=True)
    options = ["--data", str(place / data), "--segment-lengths", "2,8", "--out", str(folder), "--device", "cpu"]
    assert main([*(str(place / model) for model in models), *options, *arguments]) == 0
    return json.loads((folder / "evaluation.json").read_text())


def rows_of(path):
    with open(path) as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def olmoe():
    return Candidate("olmoe", tiny_model("olmoe").eval(), tokenizer())


@pytest.fixture(scope="module")
def texts():
    chosen = random.Random(1)
    return {
        domain: [[chosen.randrange(3, 64) for _ in range(length)] for length in lengths]
        for domain, lengths in {"prose": (5, 40, 17, 40), "code": (30, 2, 12)}.items()
    }


# --- recording ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, None])
def test_every_row_is_routed_as_if_it_were_alone(olmoe, texts, batch_size):
    recording = record(olmoe, texts, batch_size=batch_size)
    rows = [row for domain in texts.values() for row in domain]
    assert recording.domains == ["prose", "code"]
    assert recording.domain_ids.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert recording.num_experts == [E, E]
    assert recording.tokens == sum(map(len, rows))
    for index, row in enumerate(rows):
        with RouterCapture(olmoe.model) as capture:
            olmoe.model(input_ids=torch.tensor([row]))
        assert recording.valid[index].tolist() == [True] * len(row) + [False] * (40 - len(row))
        for layer, ids in zip(capture.trace(), recording.expert_ids, strict=True):
            assert ids[index, : len(row)].tolist() == layer.expert_ids[0].tolist()
        assert recording.token_ids[index, : len(row)].tolist() == row
    assert recording.decoder_token_ids is None
    assert recording.sample_row == 1
    assert recording.sample == [WORDS[token - 3] for token in rows[1]]


def test_a_batch_that_does_not_fit_is_halved_and_nothing_is_lost_or_done_twice():
    tried = []

    def run(batch):
        tried.append(len(batch))
        if len(batch) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return batch.sum()

    done = list(in_batches(torch.arange(13), run, 16))
    assert torch.cat([batch for batch, _ in done]).tolist() == list(range(13))
    assert all(result == batch.sum() for batch, result in done)
    assert tried == [13, 6, 3, 3, 3, 3, 1]


def test_one_row_that_does_not_fit_is_an_error_and_other_errors_stay():
    def run(batch):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    with pytest.raises(RuntimeError, match="out of memory with a batch of one row"):
        list(in_batches(torch.arange(2), run, 2))

    def fail(batch):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        list(in_batches(torch.arange(2), fail, 2))


def test_nan_scores_are_refused(texts):
    model = tiny_model("olmoe").eval()
    torch.nn.init.constant_(model.model.layers[1].mlp.gate.weight, float("nan"))
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.gate.*got NaN"):
        record(Candidate("nan", model, tokenizer()), texts)


def test_an_encoder_decoder_is_two_models_with_the_routers_own_choice(texts):
    switch = Candidate("switch", tiny_switch().eval(), tokenizer())
    recording = record(switch, texts, batch_size=2)
    encoder, decoder = recording.stacks()
    assert (encoder.model, decoder.model) == ("switch (encoder)", "switch (decoder)")
    assert [ids.shape[-1] for ids in (*encoder.expert_ids, *decoder.expert_ids)] == [1, 1]
    row = texts["prose"][1]
    assert encoder.token_ids[1, : len(row)].tolist() == row
    assert decoder.token_ids[1, : len(row)].tolist() == [0, *row[:-1]]
    router = switch.model.encoder.block[1].layer[1].mlp.router
    seen = []
    with router.register_forward_hook(lambda module, inputs, output: seen.append(output)):
        switch.model(input_ids=torch.tensor([row]), decoder_input_ids=torch.tensor([[0, *row[:-1]]]))
    mask, _, logits = seen[0]
    kept = mask[0].sum(dim=-1).bool()
    assert 0 < kept.sum() < len(row)  # some tokens are beyond an expert's capacity
    chosen = encoder.expert_ids[0][1, : len(row), 0].long()
    assert torch.equal(chosen[kept], mask[0].argmax(dim=-1)[kept])
    assert torch.equal(chosen, logits[0].argmax(dim=-1))


# --- text ---------------------------------------------------------------------------------------------------------


def numbered(lengths):
    return [{"text": " ".join([f"w{i}"] * length)} for i, length in enumerate(lengths)]


def encode(texts):
    return [[int(word[1:]) for word in text.split()] for text in texts]


def test_every_document_gives_its_first_row_before_any_gives_a_second():
    rows = cut({"a": numbered([9, 2, 5])}, encode, 4, 100)["a"]
    assert rows == [[0] * 4, [1] * 2, [2] * 4, [0] * 4]  # pieces of one token are left out
    assert cut({"a": numbered([9, 2, 5])}, encode, 4, 7)["a"] == [[0] * 4, [1] * 2]


@given(st.lists(st.integers(0, 20), min_size=1, max_size=8), st.integers(2, 9), st.integers(2, 60))
def test_rows_are_pieces_of_one_document_within_the_budget(lengths, length, budget):
    domains = {"long": numbered([30]), "other": numbered([*lengths, 5])}
    for rows in cut(domains, encode, length, 2 * budget).values():
        assert sum(map(len, rows)) <= budget
        assert all(2 <= len(row) <= length and len(set(row)) == 1 for row in rows)


def test_a_domain_without_text_is_refused():
    with pytest.raises(ValueError, match="at least one document of two tokens, got none in empty, short"):
        cut({"empty": [{"text": " \n"}], "a": numbered([3]), "short": numbered([1])}, encode, 4, 100)


def test_documents_of_a_causal_model_begin_with_its_start_token(olmoe):
    assert olmoe.encode(["w5 w6", "w7"]) == [[1, 5, 6], [1, 7]]
    switch = Candidate("switch", tiny_switch(), tokenizer())
    assert switch.encode(["w5 w6"]) == [[5, 6]]
    small = tiny_model("olmoe")
    small.resize_token_embeddings(32)
    with pytest.raises(ValueError, match="gives id 40, but the model has 32 embeddings"):
        Candidate("small", small, tokenizer()).encode(["w40"])


# --- advice -------------------------------------------------------------------------------------------------------


def hit_rates(*layers):
    caches = tuple(CacheHitRates(torch.tensor(rates, dtype=torch.float64), top_k) for rates, top_k in layers)
    return ModelHitRates(caches, None, {})


def test_the_knee_is_the_highest_point_above_the_chord():
    assert knee([1, 2, 3, 4, 5], [0.0, 0.6, 0.9, 0.95, 1.0]) == 2
    assert knee([1, 2, 3, 4, 5], [0.0, 0.75, 0.8, 0.9, 1.0]) == 1


@pytest.mark.parametrize("rates", [[0, 0.25, 0.5, 0.75, 1], [0, 0.1, 0.2, 0.4, 1], [1, 1, 1, 1, 1]])
def test_a_straight_sagging_or_flat_curve_has_no_knee(rates):
    assert knee([1, 2, 3, 4, 5], rates) is None
    assert knee([3], [1.0]) is None


@given(st.lists(st.integers(0, 100), min_size=3, max_size=12), st.integers(1, 9), st.integers(1, 9))
def test_the_knee_does_not_depend_on_units(rises, width, height):
    rates = [sum(rises[:i]) / (sum(rises) or 1) for i in range(len(rises) + 1)]
    sizes = list(range(len(rates)))
    scaled = knee([width * size + 3 for size in sizes], [rate * 2.0**-height for rate in rates])
    found = knee(sizes, rates)
    if found is None or scaled is None:
        assert found == scaled
        return
    above = [rate - size / (len(rates) - 1) for size, rate in zip(sizes, rates, strict=True)]
    assert above[found] == pytest.approx(max(above))
    assert above[scaled] == pytest.approx(max(above))


def test_costs_of_a_cache_are_slots_and_misses_times_bytes():
    rates = hit_rates(([0.1, 0.5, 0.8, 0.9, 0.95, 1.0], 2), ([0.4, 0.9, 1.0], 1))
    choice = choose(rates, 2.0, [100, 1000])
    assert choice.slots == (4, 2)
    assert choice.hit_rate == pytest.approx(0.9)
    assert choice.misses == pytest.approx(2 * 0.1 + 1 * 0.1)
    assert choice.memory_bytes == 4 * 100 + 2 * 1000
    assert choice.loaded_bytes == pytest.approx(0.2 * 100 + 0.1 * 1000)
    unknown = choose(rates, 2.0, None)
    assert (unknown.memory_bytes, unknown.loaded_bytes) == (None, None)


def test_the_knee_of_a_model_is_sought_from_k_slots_on():
    # With one slot for two experts the curve would bend at two slots; no token can be served there.
    assert knee_ratio(hit_rates(([0.0, 0.5, 0.9, 0.95, 0.97, 1.0], 2))) == 1.5


@pytest.mark.parametrize(("kind", "layers"), [("olmoe", 2), ("granite_moe_shared", 2), ("deepseek_v3", 1)])
def test_bytes_of_an_expert_are_those_of_its_matrices(kind, layers):
    model = tiny_model(kind).to(torch.bfloat16)
    names = RouterCapture(model).layer_names
    width = getattr(configs()[kind], "moe_intermediate_size", None) or COMMON["intermediate_size"]
    assert expert_bytes(model, names, [E] * layers) == [3 * COMMON["hidden_size"] * width * 2] * layers


def test_bytes_of_experts_that_are_modules_of_their_own():
    switch = tiny_switch()
    names = RouterCapture(switch).layer_names
    assert expert_bytes(switch, names, [E, E]) == [2 * 32 * 16 * 4] * 2
    assert expert_bytes(torch.nn.ModuleDict({"gate": torch.nn.Linear(2, 2)}), ["gate"], [2]) is None


def test_bytes_are_shown_with_three_digits():
    assert [in_bytes(count) for count in (999, 2_500, 3.14159e6, 5e9, 7e12)] == [
        *("999 B", "2.5 kB", "3.14 MB", "5 GB", "7 TB")
    ]


# --- measures -----------------------------------------------------------------------------------------------------


def test_measures_are_the_functions_of_the_package(olmoe, texts):
    recording = record(olmoe, texts)
    evaluation = measure(recording, segment_lengths=[2, 8], replicates=20)
    trace = recording.trace()
    for m, result in evaluation.srp.items():
        expected = functional.srp(trace.expert_ids, E, m, trace.valid)
        assert torch.equal(result.srp, expected.srp)
        assert torch.equal(result.static_srp, expected.static_srp)
        low, high = result.interval
        assert low <= result.srp <= high
        for cache, ids in zip(evaluation.sch[m].layers, trace.expert_ids, strict=True):
            torch.testing.assert_close(cache.hit_rate, functional.sch(ids, E, m, trace.valid), rtol=0, atol=1e-12)
        shared = functional.sch(trace.expert_ids, E, m, trace.valid)
        torch.testing.assert_close(evaluation.sch[m].shared.hit_rate, shared, rtol=0, atol=1e-12)
    for policy, rates in evaluation.policies.items():
        for cache, ids in zip((*rates.layers, rates.shared), (*trace.expert_ids, trace.expert_ids), strict=True):
            expected = functional.cache_hit_rate(ids, E, policy, trace.valid)
            torch.testing.assert_close(cache.hit_rate, expected, rtol=0, atol=1e-12)
    prose = functional.srp([ids[:4] for ids in trace.expert_ids], E, 2, trace.valid[:4])
    assert torch.equal(evaluation.domain_srp["prose"][2].srp, prose.srp)


def test_a_domain_without_a_segment_shows_nothing(olmoe, texts):
    recording = replace(record(olmoe, texts | {"notes": [[5, 6, 7]]}), domains=["prose", "code", "notes", "empty"])
    evaluation = measure(recording, segment_lengths=[2, 16], replicates=0)
    assert {name: list(found) for name, found in evaluation.domain_srp.items()} == {
        **{"prose": [2, 16], "code": [2, 16]},
        **{"notes": [2], "empty": []},
    }
    (by_domain,) = (table for table in tables([evaluation]) if table.title.startswith("SRP by domain, m=16"))
    assert by_domain.header == ["model", "prose", "code", "notes", "empty"]
    assert by_domain.rows[0][3:] == ["", ""]
    assert {row["domain"] for row in csv.DictReader(io.StringIO(to_csv([evaluation])))} == {"all", *texts, "notes"}
    (model,) = json.loads(to_json([evaluation], {}))["models"]
    assert model["srp_by_domain"]["empty"] == {}


def test_specialization_is_that_of_the_domains_and_of_the_token_ids(olmoe, texts):
    recording = record(olmoe, texts)
    found = measure(recording, segment_lengths=[2, 16], replicates=0)
    trace, domain_ids = recording.trace(), recording.domain_ids
    tokens = torch.stack([trace.valid[domain_ids == domain].sum() for domain in range(2)])
    for i, ids in enumerate(trace.expert_ids):
        of_words = grouped_usage(ids, E, recording.token_ids, COMMON["vocab_size"], trace.valid)
        torch.testing.assert_close(
            found.kinds["vocabulary"].layers[i], functional.vocabulary_specialization(of_words, 10), equal_nan=True
        )
        of_domains = grouped_usage(ids, E, domain_ids, 2, trace.valid)
        torch.testing.assert_close(
            found.kinds["domain"].layers[i], functional.domain_specialization(of_domains, tokens), equal_nan=True
        )
        srp = functional.srp(ids, E, 16, trace.valid).per_expert
        torch.testing.assert_close(found.specialization.srp[i], srp, rtol=0, atol=0)
    one_domain = replace(recording, domains=["all"], domain_ids=torch.zeros_like(domain_ids))
    assert list(measure(one_domain, segment_lengths=[2], replicates=0).kinds) == ["vocabulary"]
    bare = measure(replace(one_domain, token_ids=None), segment_lengths=[2], replicates=0)
    assert bare.kinds == {}
    assert not any("Specialization" in table.title for table in tables([bare]))
    assert "specialization" not in figures([bare])


def test_a_single_layer_has_no_cache_to_share(texts):
    evaluation = measure(record(Candidate("v3", tiny_model("deepseek_v3").eval(), tokenizer()), texts), replicates=0)
    assert evaluation.policies["lru"].shared is None
    assert not any("one cache for all layers" in table.title for table in tables([evaluation]))


def test_segments_longer_than_every_document_are_left_out(olmoe, texts):
    recording = record(olmoe, texts)
    assert list(measure(recording, segment_lengths=[8, 40, 41], replicates=0).srp) == [8, 40]
    with pytest.raises(ValueError, match="must not all exceed the longest document, 40 tokens"):
        measure(recording, segment_lengths=[41])


def test_models_that_differ_in_experts_domains_and_lengths_stand_in_one_table_and_figure(olmoe, texts):
    first = measure(record(olmoe, texts), segment_lengths=[2, 16], replicates=0)
    switch = record(Candidate("switch", tiny_switch().eval(), tokenizer()), {"short": [[3, 4, 5, 6]]})
    second = [measure(stack, segment_lengths=[2, 16], replicates=5) for stack in switch.stacks()]
    shown = tables([first, *second])
    assert shown[0].title.startswith("Ranking")
    assert sorted(row[0][3:].removesuffix(" (idle experts)") for row in shown[0].rows) == [  # of one domain of text
        *("olmoe", "switch (decoder)", "switch (encoder)")
    ]
    assert all(len(row) == len(table.header) for table in shown for row in table.rows)
    drawn = figures([first, *second])
    assert list(drawn) == ["srp", "hit_rates", "layers", "specialization", "routing_1", "routing_2", "routing_3"]
    assert all(picture.startswith(PNG) for picture in drawn.values())


# --- the command --------------------------------------------------------------------------------------------------


def test_a_model_is_judged_and_its_saved_routing_gives_the_same(place, tmp_path, capsys):
    trace = tmp_path / "new" / "olmoe.safetensors"
    first = evaluate(place, "--save-trace", str(trace), "--cache-ratios", "1", "2")
    shown = capsys.readouterr().out
    for said in ("Consistency", "Cache hit rates (in %)", "one cache for all layers", "Balance", "Specialization"):
        assert said in shown
    for said in ("Advice", "SCH m=2", "LRU", "LFU", "Belady", "token ids"):
        assert said in shown
    assert "Ranking" not in shown
    out = place / "out"
    pictures = ["hit_rates.png", "layers.png", "routing.png", "specialization.png", "srp.png"]
    assert sorted(path.name for path in out.iterdir()) == ["evaluation.csv", "evaluation.json", *pictures]
    assert all(path.read_bytes().startswith(PNG) for path in out.glob("*.png"))
    rows = rows_of(out / "evaluation.csv")
    again = [
        "--trace",
        str(trace),
        "--segment-lengths",
        "2",
        "8",
        "--cache-ratios",
        "1,2",
        "--out",
        str(tmp_path / "b"),
    ]
    assert main(again) == 0
    assert rows_of(tmp_path / "b" / "evaluation.csv") == rows

    (model,) = first["models"]
    assert model["model"] == "olmoe"
    assert model["about"]["sequence_length"] == COMMON["max_position_embeddings"]
    assert model["about"]["versions"]["torch"] == torch.__version__
    assert first["command"].startswith("consistency-reg evaluate ")
    assert (model["num_experts"], model["top_k"]) == ([E, E], [K, K])
    recording = load_trace(trace)
    value = {(row["layer"], row["measure"], row["m"], row["cache_ratio"]): float(row["value"]) for row in rows}
    expected = functional.srp(recording.trace().expert_ids, E, 8, recording.valid)
    assert value["all", "srp", "8", ""] == pytest.approx(float(expected.srp), abs=1e-12)
    assert value["layers.1.mlp.gate", "srp", "8", ""] == pytest.approx(float(expected.layers[1].srp), abs=1e-12)
    lru = model["caches"]["lru"]
    assert value["all", "hit_rate_lru", "", "2.0"] == lru["at_ratio"]["2.0"]["hit_rate"]
    assert model["advice"]["2K"]["hit_rate"] == lru["at_ratio"]["2.0"]["hit_rate"]
    shared = functional.cache_hit_rate(recording.trace().expert_ids, E, "lru", recording.valid)
    assert lru["shared"]["by_slots"] == pytest.approx(shared.tolist(), abs=1e-12)
    assert lru["shared"]["at_ratio"]["2.0"]["hit_rate"] == lru["shared"]["by_slots"][2 * 2 * K - 1]
    assert value["shared by all", "hit_rate_lru", "", "2.0"] == lru["shared"]["at_ratio"]["2.0"]["hit_rate"]
    assert value["all", "vocabulary_specialization_mean", "8", ""] == model["specialization"]["vocabulary"]["mean"]
    assert list(map(len, model["specialization"]["vocabulary"]["layers"])) == [E, E]
    size = 3 * COMMON["hidden_size"] * COMMON["intermediate_size"] * 4
    assert model["advice"]["2K"]["memory_bytes"] == 2 * 2 * K * size
    misses = [K * (1 - layer[2 * K - 1]) for layer in lru["layers_by_slots"]]
    assert model["advice"]["2K"]["loaded_bytes"] == pytest.approx(size * sum(misses))


def test_several_models_are_ranked(place, capsys):
    found = evaluate(place, models=("olmoe", "deepseek_v3", "switch", "olmoe"))
    shown = capsys.readouterr().out
    names = ["olmoe", "deepseek_v3", "switch (encoder)", "switch (decoder)", "olmoe (2)"]
    assert [model["model"] for model in found["models"]] == names
    lines = shown.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("Ranking"))
    ranked = [line.split(". ")[1] for line in lines[start:] if line.strip()[:2] in {f"{i}." for i in range(1, 6)}]
    order = sorted(found["models"], key=lambda model: -model["srp"]["2"]["srp"])
    assert [line.startswith(model["model"]) for line, model in zip(ranked, order, strict=True)] == [True] * 5


@torch.no_grad()
def test_perplexity_is_that_of_each_row_by_itself(olmoe, texts, tmp_path):
    recording = record(olmoe, texts, batch_size=2)
    sums, counts = [], []
    for domain, rows in texts.items():
        each = [
            float(olmoe.model(torch.tensor([row]), labels=torch.tensor([row])).loss) * (len(row) - 1) for row in rows
        ]
        sums.append(sum(each))
        counts.append(sum(map(len, rows)) - len(rows))
        assert recording.perplexity(domain) == pytest.approx(np.exp(sums[-1] / counts[-1]), rel=1e-4)
    assert recording.perplexity() == pytest.approx(np.exp(sum(sums) / sum(counts)), rel=1e-4)
    save_trace(recording, tmp_path / "trace")
    assert load_trace(tmp_path / "trace").perplexity("code") == recording.perplexity("code")


def test_perplexity_is_told_of_causal_models_alone(place, capsys):
    found = evaluate(place, models=("olmoe", "switch"))
    perplexities = [model["perplexity"] for model in found["models"]]
    assert perplexities[0]["all"] == perplexities[0]["words"] > 1
    assert perplexities[1:] == [{"all": None}, {"all": None}]
    assert "Perplexity" in capsys.readouterr().out


def test_cache_aware_routing_is_priced_on_the_same_text(place, capsys):
    found = evaluate(place, "--cache-aware", "0.5,0", "2", "--cache-ratios", "1,2", "--max-tokens", "300")
    rows = found["cache_aware"]
    assert [(row["cache_ratio"], row["strength"]) for row in rows] == [(r, s) for r in (1, 2) for s in (0, 0.5, 2)]
    (model,) = found["models"]
    for row in rows[::3]:
        assert row["perplexity"] == pytest.approx(model["perplexity"]["all"], rel=1e-5)
        assert (row["agreement"], row["perplexity_change"], row["misses_change"]) == (1, 0, 0)
    assert [1 - row["misses"] for row in rows[::3]] == pytest.approx(
        [at["hit_rate"] for at in model["caches"]["lru"]["at_ratio"].values()], rel=1e-5
    )
    assert rows[2]["misses"] < rows[0]["misses"]
    assert rows[2]["misses_change"] == pytest.approx(rows[2]["misses"] / rows[0]["misses"] - 1)
    written = rows_of(place / "out" / "cache_aware.csv")
    assert [float(row["perplexity"]) for row in written] == [row["perplexity"] for row in rows]
    assert (place / "out" / "cache_aware.png").read_bytes().startswith(PNG)
    printed = capsys.readouterr().out
    assert "Cache-aware routing (prior)" in printed
    assert f"olmoe, {K} slots: +0.5% perplexity buys " in printed


def test_models_can_be_given_names(place, tmp_path):
    options = ["--data", str(place / "words.jsonl"), "--segment-lengths", "4", "--out", str(tmp_path / "out")]
    assert main([f"before={place / 'olmoe'}", f"after={place / 'olmoe'}", *options, "--device", "cpu"]) == 0
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert [model["model"] for model in found["models"]] == ["before", "after"]


def test_chats_are_read_through_the_tokenizers_template(place, tmp_path):
    chats = [[{"role": "user", "content": "w3 w4 w5"}, {"role": "assistant", "content": "w6 w7"}] for _ in range(9)]
    with open(tmp_path / "chats.jsonl", "w") as file:
        for chat in chats:
            print(json.dumps({"messages": chat, "source": "x"}), file=file)
    shutil.copytree(place / "olmoe", tmp_path / "chatty")
    options = ["--data", str(tmp_path / "chats.jsonl"), "--segment-lengths", "2", "--out", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="the tokenizer of chatty has no chat template, which chats need"):
        main([str(tmp_path / "chatty"), *options])
    with_template = tokenizer()
    with_template.chat_template = "{% for m in messages %}w9 {{ m.content }} {% endfor %}</s>"
    with_template.save_pretrained(tmp_path / "chatty")
    trace = tmp_path / "trace"
    assert main([str(tmp_path / "chatty"), *options, "--text-column", "messages", "--save-trace", str(trace)]) == 0
    expected = with_template("w9 w3 w4 w5 w9 w6 w7 </s>", add_special_tokens=False)["input_ids"]
    assert load_trace(trace).token_ids.tolist() == [expected] * 9


def test_documents_are_drawn_from_the_whole_text_by_a_seed(place, tmp_path):
    with open(tmp_path / "sorted.jsonl", "w") as file:
        for word in [*["w3"] * 30, *["w9"] * 30]:  # the head of the file is of one kind
            print(json.dumps({"text": " ".join([word] * 10)}), file=file)

    def seen(*options):
        folder, trace = tmp_path / "out", tmp_path / "trace"
        data = ["--data", str(tmp_path / "sorted.jsonl"), "--segment-lengths", "4", "--max-tokens", "220"]
        saved = ["--out", str(folder), "--save-trace", str(trace), "--device", "cpu"]
        assert main([str(place / "olmoe"), *data, *saved, *options]) == 0
        return load_trace(trace).token_ids

    first, again, other = seen(), seen(), seen("--seed", "1")
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert set(first[:, 1].tolist()) == set(other[:, 1].tolist()) == {3, 9}


def test_few_documents_are_warned_of():
    with pytest.warns(UserWarning, match=r"fewer than 8 documents decide what is measured of long \(1\): give more"):
        cut({"long": numbered([50]), "short": numbered([3] * 20)}, encode, 10, 60)


def test_a_finished_run_and_its_domains(place, tmp_path):
    run = tmp_path / "runs" / "first"
    shutil.copytree(place / "olmoe", run / "model")
    (run / "config.yaml").write_text("seed_everything: 0\n")
    options = ["--domains", "math,speeches", "--corpus-bytes", "20000", "--max-tokens", "400", "--segment-lengths", "4"]
    out = tmp_path / "out"
    assert main([str(run), *options, "--out", str(out), "--replicates", "0"]) == 0
    (model,) = json.loads((out / "evaluation.json").read_text())["models"]
    assert model["model"] == "first"
    assert list(model["srp_by_domain"]) == ["math", "speeches"]
    assert model["tokens"] <= 400
    assert model["specialization"]["domain"]["mean"] > 0


@pytest.mark.parametrize(("stand", "given"), [("first", "."), ("first", "model"), ("first/model", "."), (".", "first")])
def test_a_run_has_its_name_wherever_one_stands(place, tmp_path, monkeypatch, stand, given):
    shutil.copytree(place / "olmoe", tmp_path / "first" / "model")
    monkeypatch.chdir(tmp_path / stand)
    assert load(given, device=torch.device("cpu")).name == "first"


def test_memory_that_runs_out_in_a_model_is_no_error(place, monkeypatch):
    expected = evaluate(place, "--batch-size", "1", "--no-shared-cache")
    assert "shared" not in expected["models"][0]["caches"]["lru"]
    forward = transformers.OlmoeModel.forward

    def at_most_two_rows(self, input_ids, **inputs):
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, input_ids=input_ids, **inputs)

    monkeypatch.setattr(transformers.OlmoeModel, "forward", at_most_two_rows)
    found = evaluate(place, "--batch-size", "8")
    assert found["models"][0]["srp"] == expected["models"][0]["srp"]


def dense(folder, place):
    config = transformers.LlamaConfig(**COMMON)
    return [str(save_model(folder / "dense", transformers.LlamaForCausalLM(config)))]


def unfinished(folder, place):
    (folder / "config.yaml").write_text("")
    return [str(folder)]


def remote_code(folder, place):
    shutil.copytree(place / "olmoe", folder / "remote")
    config = json.loads((folder / "remote" / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (folder / "remote" / "config.json").write_text(json.dumps(config))
    (folder / "remote" / "own.py").write_text("raise SystemExit('this code must not run')\n")
    return [str(folder / "remote")]


def lacking(folder, place):
    shutil.copytree(place / "olmoe", folder / "lacking")
    weights = folder / "lacking" / "model.safetensors"
    left = {name: tensor for name, tensor in load_file(weights).items() if "layers.1.mlp.gate" not in name}
    save_file(left, weights, {"format": "pt"})
    return [str(folder / "lacking")]


def without_tokenizer(folder, place):
    tiny_model("olmoe").save_pretrained(folder / "bare")
    return [str(folder / "bare")]


def model_and(*arguments):
    return lambda folder, place: [str(place / "olmoe"), *(argument.format(place=place) for argument in arguments)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dense, "model must contain mixture-of-experts routers.*It looks dense"),
        (lacking, r"lacks 1 of the model.s weights, such as model\.layers\.1\.mlp\.gate\.weight"),
        (without_tokenizer, "bare must hold the model.s tokenizer next to its weights, got none"),
        (unfinished, "is a run without a saved model"),
        (remote_code, "runs code of its own: read it, then allow it with --trust-remote-code"),
        (lambda folder, place: [str(folder)], "must hold a model"),
        (lambda folder, place: [], "needs a MODEL or a --trace FILE"),
        (model_and("--data", "{place}/empty.jsonl"), "at least one document of two tokens, got none in empty"),
        (model_and("--data", "{place}/words.jsonl", "--text-column", "other"), r"one of \['text'\], got 'other'"),
        (model_and("--data", "{place}/numbers.jsonl"), r"strings or chats, of which there is none among \['a', 'b'\]"),
        (model_and("--data", "{place}/latin.txt"), r"latin\.txt, line 2 is not UTF-8 \(byte 0xe9\)"),
        (model_and("--data", "{place}/latin.jsonl"), r"latin\.jsonl, line 1 is not UTF-8 \(byte 0xe9\)"),
        (model_and("--data", "{place}/words.jsonl"), "name each domain once, got 'words' again"),
        (model_and("--domains", ","), "--domains must have at least one value, got none"),
        (model_and("--memory", ",", "--read-bandwidth", "1GB/s"), "--memory must have at least one value, got none"),
        (model_and("--domains", "cooking"), "domains must be among .* got 'cooking'"),
        (model_and("--sequence-length", "1000"), "must be at most 128, the context of olmoe, got 1000"),
        (model_and("--segment-lengths", "500"), "must not all exceed the longest document"),
        (model_and("--segment-lengths", "0"), "segment_lengths? must be"),
        (model_and("--cache-ratios", "0"), "--cache-ratios must be positive"),
        (model_and("--cache-ratios", "1,nan"), "--cache-ratios must be positive"),
        (model_and("--cache-aware", "0.5", "--method", "max_rank"), "strength of method 'max_rank' must be a rank"),
        (model_and("--cache-aware", "0.5", "--cache-ratios", "0.5,2"), "--cache-ratios must be at least 1 for"),
        (lambda folder, place: ["--trace", "x", "--cache-aware", "0.5"], "--cache-aware needs a MODEL to run"),
        (model_and("--cache-aware", "-1"), "--cache-aware must be strengths of 0 or more"),
        (model_and("{place}/switch", "--cache-aware", "0.1"), "needs a causal model with its head.*: switch is none"),
        (model_and("--max-tokens", "1"), "--max-tokens must be at least 2, got 1"),
        (model_and("--batch-size", "0"), "--batch-size must be at least 1, got 0"),
        (model_and("{place}/switch", "--save-trace", "x"), "--save-trace keeps the routing of one MODEL, got 2"),
        (model_and("--trace", "{place}/words.jsonl"), "no whole trace file"),
        (model_and("--out", "{place}/words.jsonl"), "--out must be a folder, got the file"),
        (model_and("--save-trace", "{place}"), "--save-trace must be a file, got the folder"),
    ],
)
def test_bad_input_is_one_clear_error_and_nothing_is_written(place, tmp_path, arguments, message):
    out = tmp_path / "out"
    options = ["--out", str(out), "--data", str(place / "words.jsonl"), "--device", "cpu"]
    with pytest.raises((ValueError, OSError), match=message):
        main([*options, *arguments(tmp_path, place)])
    assert not out.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused(place):
    with pytest.raises(ValueError, match="--device cuda needs a CUDA device"):
        main([str(place / "olmoe"), "--data", str(place / "words.jsonl"), "--device", "cuda"])


def test_a_model_can_be_loaded_in_another_dtype(place):
    loaded = load(str(place / "olmoe"), device=torch.device("cpu"), dtype="bfloat16")
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}
    assert not loaded.model.training
    assert (loaded.name, loaded.context, loaded.is_encoder_decoder) == ("olmoe", 128, False)


def test_wandb_gets_numbers_and_pictures(place, olmoe, texts, tmp_path, monkeypatch):
    wandb.init(project="lab", mode="offline", dir=place).finish()  # wandb's process stays in the folder it began in
    monkeypatch.chdir(tmp_path)
    about = {"git_commit": "0123456789ab", "versions": {"torch": "2"}, "sequence_length": 40}
    recording = record(olmoe, texts, about=about)
    save_trace(recording, tmp_path / "t.safetensors")
    main(["--trace", "t.safetensors", "--out", "out", "--segment-lengths", "8", "--wandb", "lab"])
    run = read_run(Path("out"))
    assert run.finished
    assert run.config["model"] == "olmoe"
    assert {key: run.config[key] for key in about} == about, "those of the recording, not of this evaluation"
    (model,) = json.loads(Path("out/evaluation.json").read_text())["models"]
    logged = {name: value for row in run.history for name, value in row.items()}
    assert logged["val/srp/m8"] == model["srp"]["8"]["srp"]
    assert logged["val/cache/sch_m8_k"] == model["sch"]["8"]["at_ratio"]["1.0"]["hit_rate"]
    assert logged["val/cache/lru_2k_shared"] == model["caches"]["lru"]["shared"]["at_ratio"]["2.0"]["hit_rate"]
    training = RoutingMeasures([8], [1.0, 2.0], [])
    training.add(recording.trace())
    of_training = training.results(["all"]).model
    for name in ("static_srp", "srp/m8", "rho_hat/m8", "local_gain/m8", "cache/lru_k", "cache/lru_2k"):
        assert logged[f"val/{name}"] == pytest.approx(float(of_training[name])), name
    assert {f"evaluation/{name}" for name in ("srp", "hit_rates", "layers", "routing")} <= logged.keys()
