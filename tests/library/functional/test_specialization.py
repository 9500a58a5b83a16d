"""Specialization of experts by domain and by token id, against the oracles, and correlations against NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from reference import domain_specialization_oracle, grouped_usage_oracle, vocabulary_specialization_oracle
from strategies import on_cases, routings

from consistency_reg.functional.specialization import (
    domain_specialization,
    grouped_usage,
    pearson,
    spearman,
    vocabulary_specialization,
)


@on_cases(300, routings(), st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_specialization_equals_the_oracle(routing, groups, favourites, seed):
    ids, E, valid = routing.expert_ids, routing.num_experts, routing.valid
    group_ids = torch.randint(0, groups, valid.shape, generator=torch.Generator().manual_seed(seed))
    usage = grouped_usage(ids, E, group_ids.where(valid, -7), groups, valid)
    expected = grouped_usage_oracle(ids.numpy(), E, group_ids.numpy(), groups, valid.numpy())
    assert usage.tolist() == expected.tolist()
    tokens = [int(((group_ids == g) & valid).sum()) for g in range(groups)]
    domain = domain_specialization(usage, torch.tensor(tokens))
    assert domain.tolist() == pytest.approx(domain_specialization_oracle(expected, tokens), abs=1e-12, nan_ok=True)
    vocabulary = vocabulary_specialization(usage, favourites)
    by_hand = vocabulary_specialization_oracle(expected, favourites)
    assert vocabulary.tolist() == pytest.approx(by_hand, abs=1e-12, nan_ok=True)


def test_usage_adds_up_in_a_given_tensor():
    ids, groups = torch.tensor([[[0, 1], [1, 2]], [[0, 2], [0, 1]]]), torch.tensor([[0, 1], [1, 1]])
    out = torch.zeros(2, 3, dtype=torch.int32)
    for row in range(2):
        grouped_usage(ids[[row]], 3, groups[[row]], 2, out=out)
    assert out.tolist() == grouped_usage(ids, 3, groups, 2).tolist()


def test_a_domain_for_each_row():
    ids = torch.tensor([[[0], [1]], [[1], [1]]])
    assert grouped_usage(ids, 2, torch.tensor([1, 0]), 2).tolist() == [[0, 2], [1, 1]]


def ranks(values):
    return [np.mean([i + 1 for i, other in enumerate(sorted(values)) if other == value]) for value in values]


VALUES = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=3, max_size=12)


@on_cases(200, VALUES)
def test_correlations_equal_numpy(pairs):
    x, y = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))
    if len(x.unique()) == 1 or len(y.unique()) == 1:
        assert pearson(x, y).isnan()
        assert spearman(x, y).isnan()
        return
    assert float(pearson(x, y)) == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-12)
    assert float(spearman(x, y)) == pytest.approx(np.corrcoef(ranks(x), ranks(y))[0, 1], abs=1e-12)


def test_experts_that_are_never_used_do_not_count_in_a_correlation():
    x, y = torch.tensor([1.0, 2.0, 4.0, torch.nan]), torch.tensor([3.0, 2.0, 0.0, 9.0])
    assert float(pearson(x, y)) == pytest.approx(-1)
    assert float(spearman(x, y)) == pytest.approx(-1)
    assert pearson(x[3:], y[3:]).isnan()


@pytest.mark.parametrize(
    ("group_ids", "error", "message"),
    [
        (torch.tensor([[0.0, 1.0]]), TypeError, "group ids must be an integer tensor"),
        (
            torch.tensor([[0, 1, 1]]),
            ValueError,
            r"group ids must have shape \[B, T\] = \[1, 2\] or \[B\], got \[1, 3\]",
        ),
        (torch.tensor([[0, 2]]), ValueError, r"group ids must lie in 0\.\.1, got ids from 0 to 2"),
    ],
)
def test_bad_groups_are_named(group_ids, error, message):
    with pytest.raises(error, match=message):
        grouped_usage(torch.tensor([[[0], [1]]]), 2, group_ids, 2)


def test_favourites_must_be_positive():
    with pytest.raises(ValueError, match="favourites must be at least 1 token id, got 0"):
        vocabulary_specialization(torch.ones(2, 2, dtype=torch.int64), 0)
