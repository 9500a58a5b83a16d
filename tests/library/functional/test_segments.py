"""Windows: the same as literal loops over tokens, on ragged documents with padding anywhere."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import windows_oracle
from strategies import routings

from consistency_reg.functional.segments import (
    active_experts,
    covering_sums,
    running_sums,
    window_ends,
    window_sums,
)
from consistency_reg.routing.documents import document_positions

LENGTHS = st.integers(1, 14)  # up to longer than any row


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
