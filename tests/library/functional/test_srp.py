"""SRP: exact against the oracle on routings of every kind, and the properties that its definition promises."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import best_f1_oracle, documents, static_f1_oracle, usage_oracle, window_histograms_oracle
from strategies import models, on_cases, routings

from consistency_reg.functional.srp import best_f1, srp, static_srp
from consistency_reg.functional.srp_counts import _bincount, _scatter_count, srp_counts

SEGMENT_LENGTHS = st.sets(st.integers(1, 14), min_size=1, max_size=3).map(tuple)


def assert_equals_oracle(layers, lengths, chunk_tokens):
    masks, (valid, document_ids), tokens = layers[0].masks, layers[0].arrays, layers[0].tokens
    model = srp([layer.expert_ids for layer in layers], [layer.num_experts for layer in layers], lengths, **masks)
    usage = [usage_oracle(layer.expert_ids.numpy(), layer.num_experts, valid) for layer in layers]
    for m in lengths:
        H_NEJ = [
            window_histograms_oracle(layer.expert_ids.numpy(), layer.num_experts, m, valid, document_ids)
            for layer in layers
        ]
        for i, (layer, H) in enumerate(zip(layers, H_NEJ, strict=True)):
            one = srp(layer.expert_ids, layer.num_experts, m, **masks)
            for result in (one, model[m].layers[i]):
                assert_result(result, H.sum(axis=(0, 1)), usage[i], tokens)
                assert result.histogram.tolist() == H.sum(axis=0).tolist()
                per_expert = [float(best_f1_oracle(H_J)[0]) for H_J in H.sum(axis=0)]
                assert result.per_expert.tolist() == pytest.approx(per_expert, abs=1e-12)
            counts = srp_counts(
                layer.expert_ids, layer.num_experts, [m], **masks, per_sequence=True, chunk_tokens=chunk_tokens
            )
            assert counts.usage.tolist() == usage[i].tolist()
            assert counts.windows[m].tolist() == H.sum(axis=0).tolist()
            assert counts.sequence_windows[m].tolist() == H.sum(axis=1).tolist()
        pooled = sum(H.sum(axis=(0, 1)) for H in H_NEJ)
        assert_result(model[m], pooled, [u for layer in usage for u in layer], tokens)
        assert model[m].histogram.tolist() == pooled.tolist()


def assert_result(result, H, usage, tokens):
    F1, threshold, P, _, A = best_f1_oracle(H)
    static = static_f1_oracle(usage, tokens)
    assert int(result.threshold) == threshold
    assert float(result.srp) == pytest.approx(float(F1), abs=1e-12)
    assert float(result.size_ratio) == pytest.approx(P / A if A else 0, abs=1e-12)
    assert float(result.static_srp) == pytest.approx(float(static), abs=1e-12)
    assert float(result.local_gain) == pytest.approx(float(F1 - static), abs=1e-12)


@on_cases(200, models(), SEGMENT_LENGTHS, st.integers(1, 40))
def test_srp_equals_the_oracle(layers, lengths, chunk_tokens):
    assert_equals_oracle(layers, lengths, chunk_tokens)


@on_cases(200, st.lists(st.lists(st.integers(0, 9), min_size=5, max_size=5), min_size=1, max_size=4))
def test_best_f1_of_many_groups_at_once_equals_the_oracle(groups):
    best = best_f1(torch.tensor(groups)[:, None], 4)
    for i, H in enumerate(groups):
        F1, threshold, P, TP, A = best_f1_oracle(H)
        assert best.f1.dtype == torch.float64
        assert float(best.f1[i, 0]) == pytest.approx(float(F1), abs=1e-12)
        found = (best.threshold[i, 0], best.loaded[i, 0], best.hits[i, 0], best.active[i, 0])
        assert tuple(map(int, found)) == (threshold, P, TP, A)


def test_the_first_of_equal_thresholds_counts():
    assert best_f1(torch.tensor([0, 0, 0, 7]), 3).threshold == 0


def test_a_constant_set_has_srp_1():
    result = srp(torch.tensor([3, 1]).expand(2, 20, 2), 8, 5)
    assert (float(result.srp), float(result.size_ratio), float(result.local_gain)) == (1.0, 1.0, 0.0)


@settings(max_examples=50, deadline=None)
@given(routings())
def test_segments_of_one_token_have_srp_1(routing):
    assert float(srp(routing.expert_ids, routing.num_experts, 1, **routing.masks).srp) == float(routing.tokens > 0)


@settings(max_examples=200, deadline=None)
@given(routings(), st.integers(1, 8))
def test_srp_is_at_least_that_of_the_always_on_and_of_the_static_router_on_the_same_windows(routing, m):
    ids, E = routing.expert_ids, routing.num_experts
    found = float(srp(ids, E, m, **routing.masks).srp)
    H_EJ = window_histograms_oracle(ids.numpy(), E, m, *routing.arrays).sum(axis=0)
    windows = int(H_EJ[0].sum())
    hits_E = H_EJ @ range(m + 1)
    if windows == 0:
        assert found == 0
        return
    always_on = 2 * sum(hits_E) / (m * E * windows + sum(hits_E))
    static = float(static_f1_oracle(hits_E, m * windows))
    assert found >= max(always_on, static) - 1e-12


@settings(max_examples=50, deadline=None)
@given(routings(max_rows=4), st.integers(1, 6), st.randoms())
def test_splitting_and_permuting_sequences_changes_no_count(routing, m, random):
    E = routing.num_experts
    whole = srp_counts(routing.expert_ids, E, [m], **routing.masks)
    order = random.sample(range(len(routing.expert_ids)), len(routing.expert_ids))
    parts = [srp_counts(routing.expert_ids[[n]], E, [m], routing.valid[[n]], routing.document_ids[[n]]) for n in order]
    assert torch.equal(sum(part.windows[m] for part in parts), whole.windows[m])
    assert torch.equal(sum(part.usage for part in parts), whole.usage)


@settings(max_examples=100, deadline=None)
@given(routings(), st.integers(1, 6))
def test_packed_documents_count_as_documents_in_rows_of_their_own(routing, m):
    E = routing.num_experts
    packed = srp_counts(routing.expert_ids, E, [m], **routing.masks)
    apart = [srp_counts(routing.expert_ids[[n], a:b], E, [m]) for n, a, b in documents(*routing.arrays)]
    assert torch.equal(packed.windows[m], sum((part.windows[m] for part in apart), torch.zeros_like(packed.windows[m])))


def test_a_collapsed_router_has_a_high_srp_and_no_local_gain():
    result = srp(torch.tensor([[0, 1]]).expand(4, 64, 2), 32, 16)
    assert float(result.srp) == 1
    assert float(result.local_gain) == 0


def test_a_balanced_router_that_stays_has_local_gain():
    ids = torch.arange(8).repeat_interleave(32)[None, :, None]
    result = srp(ids, 8, 16)
    assert float(result.static_srp) == pytest.approx(2 / 9)
    assert float(result.local_gain) > 0.6


def test_nothing_to_count_gives_srp_0():
    ids = torch.tensor([[[0], [1]]])
    for result in (srp(ids, 4, 3), srp(ids[:0], 4, 2), srp(ids[:, :0], 4, 2), srp(ids, 4, 2, torch.zeros(1, 2).bool())):
        assert (float(result.srp), float(result.size_ratio), int(result.histogram.sum())) == (0, 0, 0)


def test_rows_longer_than_int16_counts_are_exact():
    ids = torch.zeros(1, 40_000, 1, dtype=torch.int64)
    assert srp_counts(ids, 2, [3, 39_999]).windows[39_999].tolist()[0][-1] == 2
    assert srp_counts(ids, 2, [3]).usage.tolist() == [40_000, 0]


@settings(max_examples=50, deadline=None)
@given(routings(), st.integers(0, 2**32 - 1))
def test_the_device_path_counts_as_the_cpu_path(routing, seed):
    generator = torch.Generator().manual_seed(seed)
    bins = torch.randint(0, 20, (3, 5, 4), generator=generator)
    keep = torch.rand(3, 5, generator=generator) < 0.6
    assert torch.equal(_bincount(bins, keep, 20), _scatter_count(bins, keep, 20))


def test_counting_never_reads_the_device():
    ids = torch.zeros(2, 6, 2, dtype=torch.int64, device="meta")  # a meta tensor has no values to read
    valid = torch.ones(2, 6, dtype=torch.bool, device="meta")
    counts = srp_counts(ids, 4, [2, 9], valid, per_sequence=True)
    assert counts.windows[2].shape == (4, 3)
    assert best_f1(counts.sequence_windows[9], 9).f1.shape == (2,)


def test_memory_is_bounded_whatever_the_number_of_sequences():
    live = []

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype != torch.bool:
                live.append(out.numel())
            return out

    ids = torch.rand(512, 32, 16).topk(2).indices
    with Largest():
        srp_counts(ids, 16, [4], chunk_tokens=256)
    assert max(live) <= max(16 * (256 + 8), ids[..., 0].numel())  # a chunk of [tokens, E], and [N, T] positions


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"expert_ids": torch.zeros(1, 2, 1)}, TypeError, "must be an int64 tensor, got a Tensor of torch.float32"),
        ({"expert_ids": torch.zeros(1, 2, 1).long().numpy()}, TypeError, "int64 tensor, got a ndarray of int64"),
        ({"expert_ids": torch.tensor([[[0, 4]]])}, ValueError, r"must lie in 0\.\.3"),
        ({"expert_ids": torch.tensor([[[1, 1]]])}, ValueError, "must not repeat an expert within a token"),
        ({"expert_ids": torch.zeros(1, 2, 5, dtype=torch.int64)}, ValueError, "got K=5"),
        ({"segment_length": 0}, ValueError, "segment_length must be an integer of at least 1, got 0"),
        ({"segment_length": 2.0}, ValueError, r"segment_length must be an integer of at least 1, got 2\.0"),
        ({"segment_length": [4, 4]}, ValueError, "segment_length must be a list of distinct integers"),
        ({"segment_length": []}, ValueError, "segment_length must be a list of distinct integers"),
        ({"valid": torch.ones(1, 2)}, TypeError, "valid must be a bool tensor"),
        ({"valid": torch.ones(2, 2, dtype=torch.bool)}, ValueError, "valid must have shape"),
        ({"document_ids": torch.zeros(1, 3, dtype=torch.int64)}, ValueError, "document_ids must have shape"),
        ({"num_experts": [4, 4]}, ValueError, "num_experts must have one entry for each of the 1 layers"),
    ],
)
def test_bad_input_is_named(change, error, message):
    arguments = {"expert_ids": torch.tensor([[[0], [1]]]), "num_experts": 4, "segment_length": 2}
    with pytest.raises(error, match=message):
        srp(**(arguments | change))


def test_bad_histograms_are_named():
    with pytest.raises(TypeError, match="histogram must be an integer tensor"):
        best_f1(torch.zeros(3), 2)
    with pytest.raises(ValueError, match=r"histogram must have shape \[\.\.\., m\+1\] with m=4, got \[3\]"):
        best_f1(torch.zeros(3, dtype=torch.int64), 4)


def test_static_srp_of_many_layers_at_once():
    usage = torch.tensor([[4, 2, 2], [0, 0, 0], [5, 3, 0]])
    expected = [float(static_f1_oracle(u.tolist(), 4)) for u in usage]
    assert static_srp(usage, torch.tensor([4, 4, 4])).tolist() == pytest.approx(expected)
