"""Saved routing: what is read is what was written, and nothing else passes for it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from consistency_reg.lab.evaluate.traces import FORMAT, Recording, compact, load_trace, save_trace


def recording(num_experts=(8, 300), top_k=(2, 3), rows=5, tokens=7, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    shapes = zip(num_experts, top_k, strict=True)
    ids = [torch.rand(rows, tokens, E, generator=generator).topk(K).indices.to(compact(E)) for E, K in shapes]
    valid = torch.arange(tokens) < torch.tensor([tokens, *range(2, rows + 1)])[:, None]
    given = {
        "model": "toy",
        "layer_names": ["layers.0.gate", "layers.1.gate"],
        "domain_ids": torch.arange(rows) % 2,
        "domains": ["prose", "code"],
        "expert_bytes": [64, 128],
        "sample_row": 1,
        "sample": [" a", "b"],
        "about": {"versions": {"torch": "2"}, "sequence_length": tokens},
    }
    return Recording(expert_ids=ids, num_experts=list(num_experts), valid=valid, **given | options)


def assert_equal(found, expected):
    for name in ("model", "num_experts", "layer_names", "domains", "expert_bytes", "sample_row", "sample", "about"):
        assert getattr(found, name) == getattr(expected, name), name
    assert [ids.dtype for ids in found.expert_ids] == [ids.dtype for ids in expected.expert_ids]
    for one, other in zip(found.expert_ids, expected.expert_ids, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(found.valid, expected.valid)
    assert torch.equal(found.domain_ids, expected.domain_ids)
    for name in ("document_ids", "token_ids", "decoder_token_ids"):
        one, other = getattr(found, name), getattr(expected, name)
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"expert_bytes": None, "sample": [], "sample_row": 0, "about": {}},
        {"document_ids": torch.tensor([[0, 0, 0, 1, 1, 1, 1]]).repeat(5, 1)},
        {"token_ids": torch.arange(35).view(5, 7), "decoder_token_ids": torch.arange(35, 70).view(5, 7)},
    ],
    ids=["all", "least", "packed", "read"],
)
def test_what_is_read_is_what_was_written(tmp_path, options):
    expected = recording(**options)
    save_trace(expected, tmp_path / "trace.safetensors")
    assert_equal(load_trace(tmp_path / "trace.safetensors"), expected)
    assert [path.name for path in tmp_path.iterdir()] == ["trace.safetensors"]


def test_documents_of_a_packed_row_stay_apart():
    packed = recording(document_ids=torch.tensor([[0, 0, 0, 1, 1, 1, 1]]).repeat(5, 1))
    assert recording().longest_document == 7
    assert packed.longest_document == 4
    assert packed.trace().positions[0].tolist() == [0, 1, 2, 0, 1, 2, 3]


def test_chunks_are_all_rows_or_those_asked_for(monkeypatch):
    monkeypatch.setattr("consistency_reg.lab.evaluate.traces.CHUNK_ROWS", 2)
    whole = recording()
    traces, rows = zip(*whole.chunks(), strict=True)
    assert torch.cat(rows).tolist() == [0, 1, 2, 3, 4]
    assert [trace.shape[0] for trace in traces] == [2, 2, 1]
    for layer, ids in enumerate(whole.expert_ids):
        assert torch.equal(torch.cat([trace.expert_ids[layer] for trace in traces]), ids.long())
    ((trace, rows),) = whole.chunks(torch.tensor([3, 1]))
    assert rows.tolist() == [3, 1]
    assert torch.equal(trace.valid, whole.valid[[3, 1]])


def test_encoder_and_decoder_are_told_apart_by_their_layers():
    read = {"token_ids": torch.ones(5, 7), "decoder_token_ids": torch.zeros(5, 7)}
    both = recording(layer_names=["encoder.block.1.router", "decoder.block.1.router"], **read)
    encoder, decoder = both.stacks()
    assert (encoder.model, decoder.model) == ("toy (encoder)", "toy (decoder)")
    assert (encoder.num_experts, decoder.num_experts) == ([8], [300])
    assert (encoder.expert_bytes, decoder.expert_bytes) == ([64], [128])
    assert torch.equal(decoder.expert_ids[0], both.expert_ids[1])
    assert (encoder.token_ids is both.token_ids, decoder.token_ids is both.decoder_token_ids) == (True, True)
    assert encoder.decoder_token_ids is decoder.decoder_token_ids is None
    one = recording(layer_names=["decoder.layers.0.gate", "decoder.layers.1.gate"])
    assert list(one.stacks()) == [one]


@pytest.mark.parametrize("kept", [0, 4, 8, 200, -1])
def test_a_truncated_file_is_refused(tmp_path, kept):
    path = tmp_path / "trace.safetensors"
    save_trace(recording(), path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"trace\.safetensors is no whole trace file"):
        load_trace(path)


def test_a_foreign_file_is_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"weights\.safetensors is no saved routing: .*consistency_reg\.routing"):
        load_trace(path)
    path.write_text("model,srp\n")
    with pytest.raises(ValueError, match="no whole trace file"):
        load_trace(path)
    with pytest.raises(FileNotFoundError, match="there is no trace file"):
        load_trace(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="there is no trace file"):
        load_trace(tmp_path)


def test_another_version_is_refused(tmp_path):
    path = tmp_path / "trace.safetensors"
    save_file({"valid": torch.ones(1, 1)}, path, {"format": FORMAT, "format_version": "2", "routing": "{}"})
    with pytest.raises(ValueError, match=r"format_version '1', got '2'"):
        load_trace(path)


def corrupt(change):
    """A file whose tensors and metadata are changed by ``change(tensors, routing)``."""

    def write(path):
        good = recording()
        tensors = {f"expert_ids.{i}": ids.clone() for i, ids in enumerate(good.expert_ids)}
        tensors |= {"valid": good.valid.to(torch.uint8), "domain_ids": good.domain_ids.clone()}
        names = ("model", "num_experts", "layer_names", "domains", "expert_bytes")
        routing = {name: getattr(good, name) for name in names}
        change(tensors, routing)
        save_file(tensors, path, {"format": FORMAT, "format_version": "1", "routing": json.dumps(routing)})

    return write


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, routing: None, None),
        (lambda tensors, routing: routing.pop("num_experts"), "num_experts"),
        (lambda tensors, routing: tensors.pop("valid"), "'valid' is missing"),
        (lambda tensors, routing: tensors.pop("expert_ids.1"), r"'expert_ids\.1' is missing"),
        (lambda tensors, routing: tensors["expert_ids.0"].fill_(200), "must lie in 0..7"),
        (lambda tensors, routing: tensors["expert_ids.0"].fill_(1), "must not repeat an expert within a token"),
        (lambda tensors, routing: tensors.update({"expert_ids.0": torch.rand(5, 7, 2)}), "must be integers"),
        (
            lambda tensors, routing: tensors.update({"expert_ids.1": tensors["expert_ids.1"][:4]}),
            r"expert_ids\.1 must have shape \[5, 7, 'K'\], got \[4, 7, 3\]",
        ),
        (lambda tensors, routing: tensors.update(document_ids=torch.zeros(5, dtype=int)), "document_ids must have"),
        (lambda tensors, routing: tensors.update(token_ids=torch.zeros(5, 7)), "token_ids must be integers"),
        (lambda tensors, routing: routing.update(model=3), "model must be a string, got 3"),
        (lambda tensors, routing: routing.update(domains="ab"), "domains must be a list of strings, got 'ab'"),
        (lambda tensors, routing: routing.update(num_experts=["8", 300]), "fits together"),
        (lambda tensors, routing: tensors.update(valid=torch.ones(5)), r"valid must have shape \[N, T\]"),
        (
            lambda tensors, routing: tensors.update({"domain_ids": torch.full((5,), 2)}),
            r"domain_ids must lie in 0\.\.1",
        ),
        (lambda tensors, routing: tensors.update({"domain_ids": torch.zeros(3)}), r"domain_ids must be integers \[N\]"),
        (lambda tensors, routing: tensors["valid"].zero_(), "at least one real token"),
        (lambda tensors, routing: routing.update(num_experts=[8]), "num_experts must have one entry for each"),
        (lambda tensors, routing: routing.update(expert_bytes=[8]), "expert_bytes must have one entry for each"),
        (lambda tensors, routing: routing.update(sample_row=5), r"sample_row must lie in 0\.\.4"),
        (lambda tensors, routing: routing.update(num_experts=[1, 300]), "between 1 and num_experts=1"),
    ],
)
def test_content_that_does_not_fit_together_is_refused(tmp_path, change, message):
    path = tmp_path / "trace.safetensors"
    corrupt(change)(path)
    if message is None:
        load_trace(path)
        return
    with pytest.raises(ValueError, match=message):
        load_trace(path)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "trace.safetensors"
    save_trace(recording(), path)
    before = path.read_bytes()

    def no_space(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", no_space)
    with pytest.raises(OSError, match="No space left"):
        save_trace(replace(recording(), model="other"), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["trace.safetensors"]
    with pytest.raises(FileNotFoundError):
        save_trace(recording(), tmp_path / "missing" / "trace.safetensors")
