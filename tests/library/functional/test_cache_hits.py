"""Cache policies: exact against caches that are really simulated, one for each size, and what users rely on."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import cache_hits_oracle, documents, fixed_set_hits_oracle
from strategies import joined_documents, models_with_one_cache, on_cases, routings

from consistency_reg.cache_policies import POLICIES
from consistency_reg.functional import stack, stack_priorities
from consistency_reg.functional.cache_hits import cache_hit_counts, cache_hit_rate
from consistency_reg.functional.cache_simulation import Simulation, document_uses, row_hit_rates, row_use_shares
from consistency_reg.routing import RoutingTrace


def corpus(routing):
    valid, document_ids = routing.arrays
    return [routing.expert_ids[n, first:end].tolist() for n, first, end in documents(valid, document_ids)]


def assert_equals_oracle(routing, policies=("lru", "lfu", "belady")):
    E, found = routing.num_experts, corpus(routing)
    for policy in policies:
        counts = cache_hit_counts(routing.expert_ids, E, policy, **routing.masks)
        expected = [[cache_hits_oracle(doc, C, policy) for C in range(1, E + 1)] for doc in found]
        assert counts.hits.tolist() == expected
    fixed = cache_hit_counts(routing.expert_ids, E, "fixed", **routing.masks)
    assert fixed.hits.tolist() == fixed_set_hits_oracle(found, E)
    assert fixed.accesses.tolist() == [len(doc) * len(doc[0]) for doc in found]
    assert fixed.rows.tolist() == [n for n, _, _ in documents(*routing.arrays)]


few_experts = routings(max_experts=7, max_tokens=20).filter(lambda routing: routing.num_experts < 256)
many_experts = routings(max_rows=1, max_tokens=6, max_experts=1).filter(lambda routing: routing.num_experts == 256)


@on_cases(300, few_experts)
def test_hits_equal_those_of_a_cache_simulated_at_every_size(routing):
    assert_equals_oracle(routing)


@on_cases(100, few_experts, st.sampled_from(["token", "access"]), st.sampled_from(["free", "miss"]))
def test_replay_and_first_uses_are_counted_as_asked(routing, replay, cold):
    E, options = routing.num_experts, {"replay": replay, "cold": cold}
    for policy in ("lru", "lfu", "belady"):
        counts = cache_hit_counts(routing.expert_ids, E, policy, **routing.masks, **options)
        expected = [[cache_hits_oracle(doc, C, policy, **options) for C in range(1, E + 1)] for doc in corpus(routing)]
        assert counts.hits.tolist() == expected
    fixed = cache_hit_counts(routing.expert_ids, E, "fixed", **routing.masks, **options)
    assert fixed.hits.tolist() == fixed_set_hits_oracle(corpus(routing), E)


@on_cases(10, many_experts, many=300)
def test_hits_with_256_experts_of_which_few_are_used(routing):
    assert_equals_oracle(routing)


@on_cases(60, models_with_one_cache)
def test_layers_share_one_cache_with_their_experts_side_by_side(layers):
    joined, E = joined_documents(layers)
    ids, num_experts = [layer.expert_ids for layer in layers], [layer.num_experts for layer in layers]
    for policy in POLICIES:
        if policy == "fixed":
            hits = fixed_set_hits_oracle(joined, E)
        else:
            hits = [[cache_hits_oracle(doc, C, policy) for C in range(1, E + 1)] for doc in joined]
        shares = [[h / (len(doc) * len(doc[0])) for h in of_doc] for of_doc, doc in zip(hits, joined, strict=True)]
        expected = torch.tensor(shares, dtype=torch.float64).mean(0).tolist()
        found = cache_hit_rate(ids, num_experts, policy, **layers[0].masks)
        assert found.tolist() == pytest.approx(expected, abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(routings(max_tokens=30, max_experts=12), st.sampled_from(POLICIES))
def test_a_bigger_cache_never_hits_less_and_the_biggest_always_hits(routing, policy):
    counts = cache_hit_counts(routing.expert_ids, routing.num_experts, policy, **routing.masks)
    assert (counts.hits.diff(dim=1) >= 0).all()
    assert torch.equal(counts.hits[:, -1], counts.accesses)
    assert (counts.hits >= 0).all()


@settings(max_examples=100, deadline=None)
@given(few_experts)
def test_belady_hits_at_least_as_often_as_lru(routing):
    lru, belady = (
        cache_hit_counts(routing.expert_ids, routing.num_experts, p, **routing.masks) for p in ("lru", "belady")
    )
    assert (belady.hits >= lru.hits).all()


@settings(max_examples=60, deadline=None)
@given(routings(max_rows=4, max_tokens=20), st.sampled_from(POLICIES[:3]), st.randoms())
def test_splitting_and_permuting_rows_changes_no_count(routing, policy, random):
    ids, E = routing.expert_ids, routing.num_experts
    whole = cache_hit_counts(ids, E, policy, **routing.masks)
    order = random.sample(range(len(ids)), len(ids))
    for n in order:
        part = cache_hit_counts(ids[[n]], E, policy, routing.valid[[n]], routing.document_ids[[n]])
        assert torch.equal(part.hits, whole.hits[whole.rows == n])
        assert torch.equal(part.accesses, whole.accesses[whole.rows == n])


def test_documents_that_are_worked_on_in_groups_count_the_same(monkeypatch):
    ids = torch.rand(40, 30, 16, generator=torch.Generator().manual_seed(0)).topk(3).indices
    valid = torch.arange(30) < torch.arange(1, 41)[:, None].clamp_max(30)
    whole = [cache_hit_counts(ids, 16, policy, valid) for policy in POLICIES]
    monkeypatch.setattr(stack, "STACK_CELLS", 7 * 16)
    for policy, expected in zip(POLICIES, whole, strict=True):
        assert torch.equal(cache_hit_counts(ids, 16, policy, valid).hits, expected.hits)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_wider_keys_count_the_same(monkeypatch, dtype):
    ids = torch.rand(4, 50, 16, generator=torch.Generator().manual_seed(0)).topk(3).indices
    narrow = [cache_hit_counts(ids, 16, policy).hits for policy in ("lru", "lfu", "belady")]
    for module in (stack, stack_priorities):
        monkeypatch.setattr(module, "fitting_dtype", lambda largest, at_least=None: dtype)
    for policy, expected in zip(("lru", "lfu", "belady"), narrow, strict=True):
        assert torch.equal(cache_hit_counts(ids, 16, policy).hits, expected)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["lru", "lfu", "belady"])
def test_long_documents_whose_clocks_do_not_fit_16_bits(policy):
    ids = torch.rand(1, 300, 5, generator=torch.Generator().manual_seed(0)).topk(2).indices.repeat(1, 60, 1)
    assert cache_hit_counts(ids, 5, policy).hits.tolist() == [quick_cache_hits(ids[0].tolist(), 5, policy)]


def quick_cache_hits(document, num_experts, policy):
    """As the oracle, in time that is linear in tokens."""
    next_use, following = [[0] * len(token) for token in document], {}
    for t in range(len(document) - 1, -1, -1):
        next_use[t] = [following.get(e, (len(document), 0)) for e in document[t]]
        following.update({e: (t, k) for k, e in enumerate(document[t])})
    hits = []
    for size in range(1, num_experts + 1):
        resident, priority, uses, count = set(), {}, {}, 0
        for t, token in enumerate(document):
            first_uses = [e for e in token if e not in uses]
            count += sum(e in resident for e in token if e in uses)
            count += sum(size > len(uses) + i for i in range(len(first_uses)))
            for k, e in enumerate(token):
                uses[e] = uses.get(e, 0) + 1
                rank = {"lru": 0, "lfu": uses[e], "belady": [-a for a in next_use[t][k]]}[policy]
                priority[e] = (rank, t, k)
                if e not in resident:
                    if len(resident) == size:
                        resident.remove(min(resident, key=priority.__getitem__))
                    resident.add(e)
        hits.append(count)
    return hits


def test_every_document_has_equal_weight():
    ids = torch.tensor([[[0], [1], [0], [1]], [[0], [0], [0], [0]]])
    valid = torch.tensor([[True] * 4, [True] * 2 + [False] * 2])
    assert cache_hit_rate(ids, 2, "lru", valid)[0] == (1 / 4 + 2 / 2) / 2


def test_rows_of_several_layers_may_be_counted_at_once():
    generator = torch.Generator().manual_seed(0)
    layers = [torch.rand(3, 20, 8, generator=generator).topk(2).indices for _ in range(2)]
    together = cache_hit_counts(torch.cat(layers), 8, "lru")
    apart = [cache_hit_counts(layer, 8, "lru").hits for layer in layers]
    assert torch.equal(together.hits, torch.cat(apart))


@settings(max_examples=50, deadline=None)
@given(routings(max_rows=4))
def test_the_fixed_set_over_batches_follows_from_usage(routing):
    ids, E = routing.expert_ids, routing.num_experts
    if routing.tokens == 0:
        return
    trace = RoutingTrace([ids], E, **routing.masks)
    uses_DE = torch.cat([part.uses for part in document_uses(trace)])
    most_used = uses_DE.sum(dim=0).argsort(descending=True, stable=True)
    by_row = row_use_shares(trace)
    for n, rows in enumerate(by_row.total):
        of_row = torch.tensor([row == n for row, _, _ in documents(*routing.arrays)])
        shares = (uses_DE / uses_DE.sum(dim=1, keepdim=True)).double()[of_row]
        assert rows.tolist() == pytest.approx(shares.sum(dim=0).tolist(), abs=1e-6)
        assert by_row.documents[n] == of_row.sum()
    share_E = (uses_DE / uses_DE.sum(dim=1, keepdim=True)).double().mean(dim=0)
    expected = cache_hit_rate(ids, E, "fixed", **routing.masks)
    assert share_E[most_used].cumsum(0).tolist() == pytest.approx(expected.tolist(), abs=1e-6)


def test_nothing_to_count():
    ids = torch.tensor([[[0], [1]]])
    for empty in (ids[:0], ids[:, :0]):
        counts = cache_hit_counts(empty, 3, "lru")
        assert (counts.hits.shape, counts.accesses.tolist()) == ((0, 3), [])
    with pytest.raises(ValueError, match="at least one valid token"):
        cache_hit_rate(ids, 3, "lru", valid=torch.zeros(1, 2, dtype=torch.bool))


def test_results_are_ordinary_tensors():
    counts = cache_hit_counts(torch.tensor([[[0], [1]]]), 2, "lru")
    assert not any(tensor.is_inference() for tensor in (counts.hits, counts.accesses, counts.rows))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"policy": "fifo"}, ValueError, "policy must be one of .* got 'fifo'"),
        ({"replay": "batch"}, ValueError, "replay must be one of .* got 'batch'"),
        ({"cold": "hit"}, ValueError, "cold must be one of .* got 'hit'"),
        ({"expert_ids": torch.zeros(1, 2, 1)}, TypeError, "must be an int64 tensor, got a Tensor of torch.float32"),
        ({"expert_ids": torch.tensor([[[0], [4]]])}, ValueError, r"must lie in 0\.\.3"),
        ({"expert_ids": torch.tensor([[[1, 1], [0, 1]]])}, ValueError, "must not repeat an expert within a token"),
        ({"expert_ids": torch.zeros(1, 2, 5, dtype=torch.int64)}, ValueError, "got K=5"),
        ({"expert_ids": torch.zeros(2, 1, dtype=torch.int64)}, ValueError, r"must have shape \[B, T, K\]"),
        ({"valid": torch.ones(1, 2)}, TypeError, "valid must be a bool tensor"),
        ({"valid": torch.ones(2, 2, dtype=torch.bool)}, ValueError, "valid must have shape"),
        ({"document_ids": torch.zeros(1, 3, dtype=torch.int64)}, ValueError, "document_ids must have shape"),
        ({"document_ids": torch.zeros(1, 2)}, TypeError, "document_ids must be an integer tensor"),
        ({"num_experts": [4, 4]}, ValueError, "num_experts must have one entry for each of the 1 layers"),
    ],
)
def test_bad_input_is_named(change, error, message):
    arguments = {"expert_ids": torch.tensor([[[0], [1]]]), "num_experts": 4, "policy": "lru"}
    with pytest.raises(error, match=message):
        cache_hit_rate(**(arguments | change))


def all_policies(routing, segment_lengths=(1, 2, 5, 99)):
    ids, E = routing.expert_ids, routing.num_experts
    for policy in ("lru", "lfu"):
        yield cache_hit_counts(ids, E, policy, **routing.masks).hits
    for m in segment_lengths:
        yield cache_hit_counts(ids, E, "sch", **routing.masks, segment_length=m).hits


@settings(max_examples=100, deadline=None)
@given(routings(max_tokens=30).filter(lambda routing: routing.expert_ids.shape[-1] == 1))
def test_with_one_expert_per_token_no_policy_hits_more_often_than_belady(routing):
    belady = cache_hit_counts(routing.expert_ids, routing.num_experts, "belady", **routing.masks).hits
    for hits in all_policies(routing):
        assert (belady >= hits).all()


def hits_with_two_slots(document, policy, m=None):
    simulated = cache_hits_oracle(document, 2, policy, m)
    ids, E = torch.tensor([document]), max(map(max, document)) + 1
    assert cache_hit_counts(ids, E, policy, segment_length=m or 1).hits[0, 1] == simulated
    return simulated


def test_belady_is_not_an_upper_bound_where_a_token_uses_several_experts():
    """The cases of docs/measures.md."""
    document = [[1, 0], [2, 1], [0, 3]]
    assert hits_with_two_slots(document, "sch", m=2) == 4
    assert hits_with_two_slots(document, "belady") == 3
    document = [[1, 0], [0, 1], [2, 0], [1, 0]]
    assert hits_with_two_slots(document, "lfu") == 7
    assert hits_with_two_slots(document, "belady") == 6


@settings(max_examples=60, deadline=None)
@given(routings(max_rows=4, max_tokens=20), st.sampled_from(("lru", "sch")))
def test_hit_rates_by_row_are_the_sums_over_its_documents(routing, policy):
    ids, E, masks = routing.expert_ids, routing.num_experts, routing.masks
    counts = cache_hit_counts(ids, E, policy, **masks, segment_length=5)
    by_row = row_hit_rates(RoutingTrace([ids], E, **masks), Simulation(policy, 5))
    for n in range(len(ids)):
        of_row = counts.rows == n
        assert by_row.documents[n] == of_row.sum()
        expected = counts.hit_rate[of_row].sum(dim=0)
        assert by_row.total[n].tolist() == pytest.approx(expected.tolist(), abs=1e-12)


def test_an_unknown_policy_by_row_is_named():
    with pytest.raises(ValueError, match=r"policy must be one of .* got 'fixed'"):
        Simulation("fixed")
