"""Bytes, slots, and their spread over layers."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consistency_reg.offload.budget import equal_slots, spread_slots


def test_equal_slots_never_exceed_the_experts():
    assert equal_slots(10**9, [10, 20], [8, 8]) == 8
    assert equal_slots(59, [10, 20], [8, 8]) == 1
    assert equal_slots(29, [10, 20], [8, 8]) == 0


curves = st.lists(
    st.lists(st.integers(0, 9), min_size=4, max_size=4).map(lambda gains: list(itertools.accumulate(gains))),
    min_size=1,
    max_size=3,
)


@given(curves=curves, spare=st.integers(0, 9))
@settings(max_examples=80, deadline=None)
def test_a_spread_is_within_a_step_of_the_best(curves, spare):
    """The greedy on the hull loses at most what one step gains."""
    L = len(curves)
    found = spread_slots(curves, [1] * L, L + spare, [1] * L)
    assert all(1 <= slots <= 4 for slots in found)
    assert sum(found) <= L + spare
    hits = lambda slots: sum(curve[number - 1] for curve, number in zip(curves, slots, strict=True))  # noqa: E731
    best = max(hits(slots) for slots in itertools.product(range(1, 5), repeat=L) if sum(slots) <= L + spare)
    largest_step = max((curve[-1] - curve[0] for curve in curves), default=0)
    assert best - largest_step <= hits(found) <= best


def test_a_cliff_is_seen_from_afar():
    assert spread_slots([[0, 1, 2, 3], [0, 0, 0, 30]], [5, 5], 25, [1, 1]) == [1, 4]


def test_bytes_count_where_experts_differ():
    assert spread_slots([[0, 5], [0, 6]], [1, 100], 102, [1, 1]) == [2, 1]


def test_less_than_the_least():
    with pytest.raises(ValueError, match=r"10 bytes do not hold the least of .* 10 bytes more are needed"):
        spread_slots([[1, 2], [1, 2]], [10, 10], 10, [1, 1])
