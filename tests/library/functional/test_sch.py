"""SCH: exact against caches that are really simulated, one for each size, and what users rely on."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import cache_hits_oracle, documents
from strategies import joined_documents, models_with_one_cache, on_cases, routings

from consistency_reg.functional import stack, stack_priorities
from consistency_reg.functional.cache_hits import cache_hit_counts
from consistency_reg.functional.sch import sch


def sch_counts(ids, num_experts, m, valid=None, document_ids=None):
    return cache_hit_counts(ids, num_experts, "sch", valid, document_ids, segment_length=m)


def assert_equals_oracle(routing, m):
    E = routing.num_experts
    counts = sch_counts(routing.expert_ids, E, m, **routing.masks)
    found = documents(*routing.arrays)
    assert counts.rows.tolist() == [n for n, _, _ in found]
    for hits, accesses, (n, first, end) in zip(counts.hits, counts.accesses, found, strict=True):
        document = routing.expert_ids[n, first:end].tolist()
        assert hits.tolist() == [cache_hits_oracle(document, C, "sch", m) for C in range(1, E + 1)]
        assert accesses == len(document) * len(document[0])


few_experts = routings(max_experts=7, max_tokens=20).filter(lambda routing: routing.num_experts < 256)
many_experts = routings(max_rows=1, max_tokens=6, max_experts=1).filter(lambda routing: routing.num_experts == 256)
segment_lengths = st.integers(1, 25)


@on_cases(300, few_experts, segment_lengths)
def test_hits_equal_those_of_a_cache_simulated_at_every_size(routing, m):
    assert_equals_oracle(routing, m)


@on_cases(10, many_experts, segment_lengths, many=300)
def test_hits_with_256_experts_of_which_few_are_used(routing, m):
    assert_equals_oracle(routing, m)


@on_cases(60, models_with_one_cache, segment_lengths)
def test_the_sch_of_a_model_is_that_of_one_cache_for_the_experts_of_all_layers(layers, m):
    ids, num_experts = [layer.expert_ids for layer in layers], [layer.num_experts for layer in layers]
    joined, E = joined_documents(layers)
    shares = [
        [cache_hits_oracle(doc, C, "sch", m) / (len(doc) * len(doc[0])) for C in range(1, E + 1)] for doc in joined
    ]
    expected = torch.tensor(shares, dtype=torch.float64).mean(0).tolist()
    assert sch(ids, num_experts, m, **layers[0].masks).tolist() == pytest.approx(expected, abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(routings(max_tokens=30, max_experts=12), segment_lengths)
def test_a_bigger_cache_never_hits_less_and_the_biggest_always_hits(routing, m):
    counts = sch_counts(routing.expert_ids, routing.num_experts, m, **routing.masks)
    assert (counts.hits.diff(dim=1) >= 0).all()
    assert torch.equal(counts.hits[:, -1], counts.accesses)


@settings(max_examples=60, deadline=None)
@given(routings(max_rows=4, max_tokens=20), segment_lengths, st.randoms())
def test_splitting_and_permuting_rows_changes_no_count(routing, m, random):
    ids, E = routing.expert_ids, routing.num_experts
    whole = sch_counts(ids, E, m, **routing.masks)
    for n in random.sample(range(len(ids)), len(ids)):
        part = sch_counts(ids[[n]], E, m, routing.valid[[n]], routing.document_ids[[n]])
        assert torch.equal(part.hits, whole.hits[whole.rows == n])


def test_documents_that_are_worked_on_in_groups_count_the_same(monkeypatch):
    ids = torch.rand(40, 30, 16, generator=torch.Generator().manual_seed(0)).topk(3).indices
    valid = torch.arange(30) < torch.arange(1, 41)[:, None].clamp_max(30)
    whole = sch_counts(ids, 16, 5, valid)
    monkeypatch.setattr(stack, "STACK_CELLS", 7 * 16)
    assert torch.equal(sch_counts(ids, 16, 5, valid).hits, whole.hits)


def test_keys_that_do_not_fit_32_bits_count_the_same(monkeypatch):
    ids = torch.rand(4, 50, 16, generator=torch.Generator().manual_seed(0)).topk(3).indices
    narrow = sch_counts(ids, 16, 9)
    monkeypatch.setattr(stack_priorities, "fitting_dtype", lambda largest, at_least=None: torch.int64)
    assert torch.equal(sch_counts(ids, 16, 9).hits, narrow.hits)


def test_a_constant_set_misses_only_where_the_cache_is_smaller_than_the_set():
    ids = torch.tensor([3, 1]).expand(2, 20, 2)
    rates = sch(ids, 4, 4).tolist()
    assert rates[1:] == [1, 1, 1]
    assert rates[0] < 1


def test_a_window_of_the_whole_document_knows_all_future_uses():
    ids = torch.rand(3, 12, 6, generator=torch.Generator().manual_seed(1)).topk(2).indices
    assert torch.equal(sch_counts(ids, 6, 12).hits, sch_counts(ids, 6, 1000).hits)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"segment_length": 0}, ValueError, "segment_length must be an integer of at least 1, got 0"),
        ({"segment_length": 2.0}, TypeError, "segment_length must be one integer"),
        ({"segment_length": [4, 8]}, TypeError, "segment_length must be one integer"),
        ({"expert_ids": torch.zeros(1, 2, 1)}, TypeError, "must be an int64 tensor, got a Tensor of torch.float32"),
        ({"expert_ids": torch.tensor([[[0], [4]]])}, ValueError, r"must lie in 0\.\.3"),
        ({"expert_ids": torch.tensor([[[1, 1], [0, 1]]])}, ValueError, "must not repeat an expert within a token"),
        ({"valid": torch.ones(1, 2)}, TypeError, "valid must be a bool tensor"),
        ({"valid": torch.zeros(1, 2, dtype=torch.bool)}, ValueError, "at least one valid token"),
        ({"document_ids": torch.zeros(1, 3, dtype=torch.int64)}, ValueError, "document_ids must have shape"),
    ],
)
def test_bad_input_is_named(change, error, message):
    arguments = {"expert_ids": torch.tensor([[[0], [1]]]), "num_experts": 4, "segment_length": 2}
    with pytest.raises(error, match=message):
        sch(**(arguments | change))
