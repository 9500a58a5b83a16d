"""Balance: global, local and from token to token, against the oracles."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import cv_oracle, local_cv_oracle, overlap_oracle, usage_oracle
from strategies import on_cases, routings

from consistency_reg.functional.balance import (
    _segment_usage,
    _segments,
    local_cv,
    local_cv_means,
    overlap_mean,
    overlap_rate,
    usage_balance,
    usage_counts,
)
from consistency_reg.functional.segments import active_experts
from consistency_reg.routing.documents import document_positions


def assert_equals_oracle(routing, m, chunk_tokens):
    ids, E = routing.expert_ids, routing.num_experts
    usage = usage_oracle(ids.numpy(), E, routing.valid.numpy())
    assert usage_counts(ids, E, routing.valid).tolist() == usage.tolist()
    means = local_cv_means(ids, E, (m, None), **routing.masks, chunk_tokens=chunk_tokens)
    for length in (m, None):
        expected = local_cv_oracle(ids.numpy(), E, length, *routing.arrays)
        assert float(local_cv(ids, E, length, **routing.masks)) == pytest.approx(expected, abs=1e-12)
        assert float(means[length].value) == pytest.approx(expected, abs=1e-12)
    shared, accesses = overlap_oracle(ids.numpy(), *routing.arrays)
    overlap = overlap_mean(ids, E, **routing.masks, chunk_tokens=chunk_tokens)
    assert (int(overlap.total), int(overlap.count)) == (shared, accesses)
    assert float(overlap_rate(ids, E, **routing.masks)) == pytest.approx(shared / max(accesses, 1), abs=1e-12)


@on_cases(200, routings(), st.integers(1, 8), st.integers(1, 40))
def test_balance_equals_the_oracle(routing, m, chunk_tokens):
    assert_equals_oracle(routing, m, chunk_tokens)


@on_cases(100, st.lists(st.integers(0, 20), min_size=1, max_size=8), st.integers(20, 40))
def test_global_balance_is_that_of_the_shares(usage, tokens):
    balance = usage_balance(torch.tensor(usage), torch.tensor(tokens))
    share = np.array(usage) / tokens
    fair = share.mean() or 1.0
    assert float(balance.sd) == pytest.approx(100 * share.std(), abs=1e-12)
    assert float(balance.cv) == pytest.approx(cv_oracle(usage), abs=1e-12)
    assert float(balance.max_over_mean) == pytest.approx(share.max() / fair, abs=1e-12)
    assert float(balance.min_share) == pytest.approx(share.min() / fair, abs=1e-12)


def test_layers_are_judged_one_by_one():
    usage = torch.tensor([[2, 2], [4, 0]])
    assert usage_balance(usage, torch.tensor([4, 4])).cv.tolist() == [0.0, 1.0]


def test_a_router_may_be_balanced_globally_and_not_locally():
    ids = torch.arange(4).repeat_interleave(16)[None, :, None]
    assert float(usage_balance(usage_counts(ids, 4), torch.tensor(64)).cv) == 0
    assert float(local_cv(ids, 4)) == 0
    assert float(local_cv(ids, 4, 8)) > 1


def test_no_tokens_give_zeros():
    balance = usage_balance(torch.zeros(4, dtype=torch.int64), torch.tensor(0))
    assert [float(x) for x in (balance.sd, balance.cv, balance.max_over_mean, balance.min_share)] == [0, 0, 0, 0]
    assert float(local_cv(torch.zeros(0, 3, 1, dtype=torch.int64), 4)) == 0
    assert float(overlap_rate(torch.zeros(2, 0, 1, dtype=torch.int64), 4)) == 0


def test_counting_never_reads_the_device():
    ids = torch.zeros(2, 6, 2, dtype=torch.int64, device="meta")  # a meta tensor has no values to read
    valid = torch.ones(2, 6, dtype=torch.bool, device="meta")
    assert usage_counts(ids, 4, valid).shape == (4,)
    assert local_cv_means(ids, 4, (2, None), valid)[2].value.shape == ()
    assert overlap_mean(ids, 4, valid).value.shape == ()


@settings(max_examples=50, deadline=None)
@given(routings(), st.integers(1, 8))
def test_the_device_path_counts_as_the_cpu_path(routing, m):
    active = active_experts(routing.expert_ids, routing.num_experts, routing.valid)
    before = torch.nn.functional.pad(active.cumsum(dim=1), (0, 0, 1, 0))
    positions = document_positions(routing.valid.shape, **routing.masks)
    for length in (m, None):
        segments = _segments(positions, length)
        selected = _segment_usage(before, *segments)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("consistency_reg.functional.balance.is_on_host", lambda tensor: False)
            everywhere = _segment_usage(before, *segments)
        assert torch.equal(everywhere[segments[0].flatten()], selected)
        assert int(everywhere.sum()) == int(selected.sum())


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="segment_length must be at least 1 token or None for whole documents, got 0"):
        local_cv(torch.tensor([[[0]]]), 2, 0)
    with pytest.raises(ValueError, match=r"must lie in 0\.\.1"):
        overlap_rate(torch.tensor([[[2]]]), 2)
    with pytest.raises(TypeError, match="int64"):
        usage_counts(torch.tensor([[[0.5]]]), 2)
