"""Documents and windows: the same as literal loops over tokens, on ragged documents with padding anywhere."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import documents, windows_oracle
from strategies import routings

from consistency_reg.functional.segments import (
    active_experts,
    covering_sums,
    document_positions,
    running_sums,
    window_ends,
    window_sums,
)

LENGTHS = st.integers(1, 14)  # up to longer than any row


@given(routings())
def test_positions_count_the_tokens_of_a_document(routing):
    expected = torch.full(routing.valid.shape, -1)
    for n, first, end in documents(*routing.arrays):
        expected[n, first:end] = torch.arange(end - first)
    assert torch.equal(document_positions(tuple(routing.valid.shape), **routing.masks), expected)


def test_masks_may_be_left_out():
    valid = torch.tensor([[True, False, True]])
    assert document_positions((1, 3)).tolist() == [[0, 1, 2]]
    assert document_positions((1, 3), valid).tolist() == [[0, -1, 0]]
    assert document_positions((1, 3), None, torch.tensor([[4, 4, 2]])).tolist() == [[0, 1, 0]]
    assert document_positions((2, 0)).shape == (2, 0)


def test_a_document_id_that_comes_back_is_a_new_document():
    assert document_positions((1, 5), None, torch.tensor([[1, 1, 2, 1, 1]])).tolist() == [[0, 1, 0, 0, 1]]


def test_padding_ends_a_document_even_if_its_id_goes_on():
    valid = torch.tensor([[True, True, False, True, True]])
    assert document_positions((1, 5), valid, torch.zeros(1, 5, dtype=torch.int64)).tolist() == [[0, 1, -1, 0, 1]]


@given(routings())
def test_activations_are_the_ids_of_valid_tokens(routing):
    active = active_experts(routing.expert_ids, routing.num_experts, routing.valid)
    N, T = routing.valid.shape
    assert active.shape == (N, T, routing.num_experts)
    for n in range(N):
        for t in range(T):
            expected = sorted(routing.expert_ids[n, t].tolist()) if routing.valid[n, t] else []
            assert active[n, t].nonzero().flatten().tolist() == expected
    assert active.max() <= 1


@given(routings(), LENGTHS)
def test_window_sums_are_those_of_the_windows(routing, m):
    active = active_experts(routing.expert_ids, routing.num_experts, routing.valid)
    sums = window_sums(running_sums(active), m)
    ends = window_ends(document_positions(tuple(routing.valid.shape), **routing.masks), m)
    windows = windows_oracle(m, *routing.arrays)
    assert int(ends.sum()) == len(windows)
    for n, tokens in windows:
        assert ends[n, tokens[-1]]
        assert torch.equal(sums[n, tokens[-1]], active[n, list(tokens)].sum(dim=0).to(sums.dtype))


@given(routings(), LENGTHS)
def test_covering_sums_add_the_windows_over_each_token(routing, m):
    ends = window_ends(document_positions(tuple(routing.valid.shape), **routing.masks), m)
    of_window = torch.randint(0, 9, (*ends.shape, 3)) * ends[:, :, None]
    expected = torch.zeros_like(of_window)
    for n, tokens in windows_oracle(m, *routing.arrays):
        for t in tokens:
            expected[n, t] += of_window[n, tokens[-1]]
    assert torch.equal(covering_sums(of_window, m), expected)


def test_window_sums_stay_exact_where_the_running_total_leaves_int16():
    ones = torch.ones(1, 70_000, 1, dtype=torch.int16)
    ones[0, ::3] = 0
    short = window_sums(running_sums(ones), 64)[0, 64:, 0]
    assert torch.equal(short.long(), window_sums(running_sums(ones.long()), 64)[0, 64:, 0])
    assert torch.equal(covering_sums(ones, 64).long(), covering_sums(ones.long(), 64))
