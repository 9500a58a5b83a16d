"""Caches replayed access by access: the sums are those of the curves, and engines' own records come out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import cache_access_hits_oracle, documents
from strategies import models, on_cases, routings, trace_of

from consistency_reg.cache_policies import EVICTING, POLICIES
from consistency_reg.functional.cache_hits import cache_hit_counts
from consistency_reg.functional.cache_replay import cache_access_hits, replay_engine

few_experts = routings(max_experts=7, max_tokens=16).filter(lambda routing: routing.num_experts < 256)
replays, firsts = st.sampled_from(["token", "access"]), st.sampled_from(["free", "miss"])


@on_cases(150, few_experts, st.sampled_from(EVICTING), replays, firsts, st.integers(1, 7))
def test_every_access_hits_as_in_a_simulated_cache(routing, policy, replay, cold, slots):
    options = {"replay": replay, "cold": cold}
    (hits,) = cache_access_hits(routing.expert_ids, routing.num_experts, slots, policy, **routing.masks, **options)
    for n, first, end in documents(*routing.arrays):
        document = routing.expert_ids[n, first:end].tolist()
        assert hits[n, first:end].tolist() == cache_access_hits_oracle(document, slots, policy, None, **options)
    assert not hits[~routing.valid].any()


@settings(max_examples=100, deadline=None)
@given(models(max_tokens=12, max_experts=4), st.sampled_from(POLICIES), replays, firsts, st.integers(1, 8))
def test_the_sums_are_those_of_the_curve(layers, policy, replay, cold, slots):
    trace, options = trace_of(layers), {"replay": replay, "cold": cold}
    if layers[0].tokens == 0 or slots > sum(trace.num_experts):
        return
    counts = cache_hit_counts(trace.expert_ids, trace.num_experts, policy, **layers[0].masks, **options)
    hits = cache_access_hits(trace.expert_ids, trace.num_experts, slots, policy, **layers[0].masks, **options)
    assert sum(int(layer.sum()) for layer in hits) == int(counts.hits[:, slots - 1].sum())
    assert [layer.shape for layer in hits] == [layer.expert_ids.shape for layer in layers]


@settings(max_examples=60, deadline=None)
@given(few_experts, st.integers(1, 9))
def test_an_engine_that_goes_token_by_token_is_the_replay_by_token(routing, slots):
    ids, E = routing.expert_ids[:1].clamp(0, routing.num_experts - 1), routing.num_experts
    if not routing.valid[0].all() or slots < ids.shape[-1]:
        return
    (expected,) = cache_access_hits(ids, E, slots, "lru", cold="miss")
    assert torch.equal(replay_engine([ids[0]], E, slots).held[0], expected[0])


def test_a_prompt_is_one_call_that_looks_each_expert_up_once_and_evicts_none_of_its_own():
    ids = torch.tensor([[0, 1], [1, 2], [3, 0], [1, 2]])
    replay = replay_engine([ids], 4, capacity=2, calls=torch.tensor([0, 0, 0, 1]))
    assert replay.looked_up[0].tolist() == [[True, True], [False, True], [True, False], [True, True]]
    assert replay.held[0].tolist() == [[False, False]] * 3 + [[True, True]]
    assert (replay.hits, replay.misses) == (2, 4)


def test_bytes_and_budgets_of_one_cache_or_one_for_each_layer():
    layers = [torch.tensor([[0], [1], [0], [1]]), torch.tensor([[0], [0], [1], [0]])]
    one = replay_engine(layers, 2, capacity=7, expert_bytes=[2, 3])
    assert [held.flatten().tolist() for held in one.held] == [[False, False, True, False], [False, True, False, False]]
    assert (one.hits, one.misses, one.bytes_read) == (2, 6, 2 + 3 + 2 + 3 + 2 + 3)
    own = replay_engine(layers, 2, capacity=[4, 3], expert_bytes=[2, 3])
    assert [held.flatten().tolist() for held in own.held] == [[False, False, True, True], [False, True, False, False]]
    assert own.bytes_read == 2 * 2 + 3 * 3
    assert own.hit_rate == 3 / 8


def test_an_empty_stream_reads_nothing():
    replay = replay_engine([torch.zeros(0, 1, dtype=torch.int64)], 2, capacity=2)
    assert (replay.hits, replay.misses, replay.bytes_read) == (0, 0, 0)
    assert replay.bytes_of_calls([10], torch.zeros(0, dtype=torch.int64)).tolist() == []


@pytest.mark.parametrize("policy", EVICTING)
def test_a_cache_for_all_experts_misses_each_once(policy):
    ids = torch.rand(50, 6, generator=torch.Generator().manual_seed(0)).topk(2).indices
    replay = replay_engine([ids, ids.flip(0)], 6, capacity=12, policy=policy)
    assert replay.misses == 12


def test_belady_reads_least():
    layers = [torch.rand(200, 16, generator=torch.Generator().manual_seed(i)).topk(2).indices for i in range(3)]
    misses = {policy: replay_engine(layers, 16, 12, policy=policy).misses for policy in EVICTING}
    assert misses["belady"] < min(misses["lru"], misses["lfu"])


def test_a_fixed_set_may_be_chosen_by_other_data():
    ids = torch.tensor([[[0], [1], [1], [2]]])
    (hits,) = cache_access_hits(ids, 3, 1, "fixed", usage=torch.tensor([0, 0, 9]))
    assert hits.flatten().tolist() == [False, False, False, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy": "fixed"}, r"policy must be one of \('lru', 'lfu', 'belady'\), got 'fixed'"),
        ({"capacity": [1]}, "capacity must be a number or have one for each of the 2 layers, got 1"),
        ({"expert_bytes": [1]}, "expert_bytes must have one entry for each of the 2 layers, got 1"),
        ({"calls": torch.zeros(3)}, r"calls must have shape \[T\] = \[2\], got \[3\]"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"expert_ids": [torch.tensor([[0], [1]])] * 2, "num_experts": 2, "capacity": 2}
    with pytest.raises(ValueError, match=message):
        replay_engine(**(arguments | change))
    with pytest.raises(ValueError, match="slots must be at least 1, got 0"):
        cache_access_hits(torch.tensor([[[0]]]), 1, slots=0)
