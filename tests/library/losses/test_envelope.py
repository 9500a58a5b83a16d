"""The local-consistency losses: the value is exactly 1 - SRP or the miss rate, the gradient that of a relaxed form."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from memory import peak_bytes
from padding import assert_padding_has_no_effect
from processes import on_processes
from reference import (
    central_differences,
    expert_mean_oracle,
    lru_hits_oracle,
    lru_residents_oracle,
    lru_worth_oracle,
    margin_membership_oracle,
    margins_oracle,
    probability_membership_oracle,
    relaxed_hit_rate,
    relaxed_srp,
    srp_at_fixed_sets,
    srp_worth_oracle,
    windows_oracle,
)
from strategies import routings

from consistency_reg import CacheConsistencyLoss, LocalConsistencyLoss, RoutingTrace
from consistency_reg.functional import consistency as functional
from consistency_reg.functional.segments import active_experts, running_sums, window_ends, window_sums
from consistency_reg.functional.srp import srp
from consistency_reg.losses import consistency

SMALL = routings(max_rows=2, max_tokens=7, max_experts=5).filter(lambda routing: routing.num_experts < 256)
LENGTHS = st.lists(st.integers(2, 14), min_size=1, max_size=3, unique=True)
EXAMPLES = 30

ANY_LOSS = [
    pytest.param(LocalConsistencyLoss, {"segment_lengths": (2, 3, 9)}, id="srp"),
    pytest.param(CacheConsistencyLoss, {"cache_ratio": 1.5}, id="cache"),
]
ANY_OPTIONS = [
    {},
    {"balance_neutral": False},
    {"balance_neutral": "slope", "scope": "batch"},
    {"scope": "sequence"},
    {"membership": "probability"},
    {"membership": "probability", "balance_neutral": False, "scope": "sequence"},
]


def scores_for(routing, seed=0):
    """[N, T, E] float64 scores by which a top-k router would have chosen the ids of the valid tokens."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(*routing.valid.shape, routing.num_experts, generator=generator, dtype=torch.float64)
    return noise + active_experts(routing.expert_ids, routing.num_experts, routing.valid)


def trace_for(routing, *scores):
    return RoutingTrace([routing.expert_ids] * len(scores), routing.num_experts, logits=scores, **routing.masks)


def value_and_gradient(loss, routing, scores):
    leaf = scores.clone().requires_grad_()
    value = loss(trace_for(routing, leaf))
    value.backward()
    return value.detach(), leaf.grad


def random_routing(N, T, E, K, seed=0, stickiness=0.6):
    """Logits whose top-k changes slowly, and the ids: for tests that need one realistic batch."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(N, T, E, generator=generator)
    for t in range(1, T):
        logits[:, t] = stickiness * logits[:, t - 1] + math.sqrt(1 - stickiness**2) * logits[:, t]
    return logits, logits.topk(K).indices


# --- values -------------------------------------------------------------------------------------------------------


@given(routings(), LENGTHS)
@settings(max_examples=100)
def test_the_value_is_one_minus_srp(routing, lengths):
    fitting = [m for m in lengths if windows_oracle(m, *routing.arrays)]
    expected = [1 - srp(routing.expert_ids, routing.num_experts, m, **routing.masks).srp.item() for m in fitting]
    value = LocalConsistencyLoss(lengths)(trace_for(routing, scores_for(routing)))
    assert value.item() == pytest.approx(np.mean(expected) if fitting else 0, abs=1e-12)


@given(routings(), st.sampled_from([0.4, 1.0, 1.5, 2.0, 100.0]))
@settings(max_examples=100)
def test_the_value_is_the_miss_rate_of_a_literal_lru_cache(routing, cache_ratio):
    K, E = routing.expert_ids.shape[-1], routing.num_experts
    slots = min(max(round(cache_ratio * K), 1), E)
    hits, accesses = lru_hits_oracle(routing.expert_ids.numpy(), E, slots, *routing.arrays)
    value = CacheConsistencyLoss(cache_ratio)(trace_for(routing, scores_for(routing)))
    assert value.item() == pytest.approx(1 - hits / accesses if accesses else 0, abs=1e-12)


@given(routings(), st.integers(1, 8))
def test_residents_are_those_of_a_literal_lru_cache(routing, slots):
    position = trace_for(routing, scores_for(routing)).positions
    residents = functional.lru_residents(routing.expert_ids, routing.num_experts, position, slots)
    expected = lru_residents_oracle(routing.expert_ids.numpy(), routing.num_experts, slots, *routing.arrays)
    assert np.array_equal(residents.numpy() & routing.valid.numpy()[:, :, None], expected)


def test_layers_may_differ_and_are_averaged():
    traces = [random_routing(3, 21, E, K, seed=E) for E, K in ((8, 2), (5, 4), (3, 3), (2, 1))]
    ids, logits = [ids for _, ids in traces], [logits for logits, _ in traces]
    trace = RoutingTrace(ids, [8, 5, 3, 2], logits=logits)
    loss = LocalConsistencyLoss((4, 16))
    alone = [
        loss(RoutingTrace([i], i_logits.shape[-1], logits=[i_logits])) for i, i_logits in zip(ids, logits, strict=True)
    ]
    assert loss.per_layer(trace).tolist() == [value.item() for value in alone]
    assert loss(trace).item() == pytest.approx(sum(value.item() for value in alone) / 4, abs=1e-7)


@pytest.mark.parametrize("options", ANY_OPTIONS, ids=str)
@pytest.mark.parametrize("kind", [LocalConsistencyLoss, CacheConsistencyLoss])
def test_layers_worked_on_together_are_as_each_by_itself(kind, options, monkeypatch):
    """Five of one shape, and two others in between; each of its own scale, so that none can stand for another."""
    shapes = [(8, 2), (8, 2), (5, 4), (8, 2), (8, 2), (8, 2), (8, 1)]
    traces = [random_routing(3, 70, E, K, seed=layer) for layer, (E, K) in enumerate(shapes)]
    logits = [(logits * 2**layer).requires_grad_() for layer, (logits, _) in enumerate(traces)]
    valid = torch.arange(70) < torch.tensor([[70], [33], [50]])
    trace = RoutingTrace([ids for _, ids in traces], [E for E, _ in shapes], logits=logits, valid=valid)
    weights = torch.arange(1.0, 8.0)
    found = []
    for most in (1, 2 * 3 * 70 * 8, 2**16):  # one layer at a time, two, all
        monkeypatch.setattr("consistency_reg.losses.envelope.STACKED", most)
        values = kind(**options).per_layer(trace)
        found.append((values.detach(), *torch.autograd.grad((values * weights).sum(), logits)))
    for several in found[1:]:
        torch.testing.assert_close(several, found[0], rtol=1e-5, atol=1e-9)
    assert all(gradient.any() for gradient in found[0][1:])


@pytest.mark.parametrize("tokens", [4, 41])
def test_a_perfectly_consistent_trace_costs_nothing(tokens):
    """Two documents, each with an expert set of its own, that never changes inside of it."""
    ids = torch.tensor([[0, 3]] * tokens + [[4, 1]] * tokens)[None]
    document_ids = torch.tensor([0] * tokens + [1] * tokens)[None]
    scores = torch.zeros(1, 2 * tokens, 6).scatter(2, ids, 1.0)
    trace = RoutingTrace([ids], 6, logits=[scores], document_ids=document_ids)
    assert LocalConsistencyLoss((4, 16, 64))(trace).item() == 0.0
    assert CacheConsistencyLoss(1.0)(trace).item() == pytest.approx(1 / tokens)  # the first uses


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize(("kind", "options"), ANY_LOSS)
def test_the_value_does_not_depend_on_the_precision_of_the_scores(kind, options, dtype, requires_grad):
    logits, ids = random_routing(3, 41, 7, 2)
    loss = kind(**options)
    expected = loss(RoutingTrace([ids], 7, logits=[logits]))
    value = loss(RoutingTrace([ids], 7, logits=[logits.to(dtype).requires_grad_(requires_grad)]))
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert value.float().item() == expected.item()


def test_nothing_to_count_is_zero_with_a_zero_gradient():
    logits, ids = random_routing(2, 6, 4, 2)
    for kind, options in ((LocalConsistencyLoss, {}), (CacheConsistencyLoss, {})):
        leaf = logits.clone().requires_grad_()
        value = kind(**options)(RoutingTrace([ids], 4, logits=[leaf], valid=torch.zeros(2, 6, dtype=torch.bool)))
        value.backward()
        assert value.item() == 0
        assert leaf.grad.abs().max() == 0
    leaf = logits.clone().requires_grad_()
    value = LocalConsistencyLoss((7, 64))(RoutingTrace([ids], 4, logits=[leaf]))  # longer than the rows
    value.backward()
    assert value.item() == 0
    assert leaf.grad.abs().max() == 0


def test_without_a_graph_there_is_a_value_and_no_gradient():
    logits, ids = random_routing(2, 9, 4, 2)
    loss = LocalConsistencyLoss((4,))
    with_graph = loss(RoutingTrace([ids], 4, logits=[logits.requires_grad_()]))
    assert with_graph.requires_grad
    without = loss(RoutingTrace([ids], 4, logits=[logits]).detach())
    with torch.no_grad():
        in_no_grad = loss(RoutingTrace([ids], 4, logits=[logits]))
    assert not without.requires_grad
    assert not in_no_grad.requires_grad
    assert with_graph.item() == without.item() == in_no_grad.item()


# --- gradients ----------------------------------------------------------------------------------------------------


def memberships(routing, scores, membership, temperature):
    """``source -> soft activations`` with theta held at the value that it has for ``scores``."""
    ids = routing.expert_ids.numpy()
    if membership == "probability":
        return lambda source: probability_membership_oracle(source, ids.shape[-1])
    theta = margins_oracle(scores, ids, routing.valid.numpy())
    return lambda source: margin_membership_oracle(source, theta, temperature)


def relaxed_objectives(loss, routing):
    """(``soft -> relaxed value``, worth) for each value that the loss averages over."""
    case = routing.expert_ids.numpy(), routing.num_experts
    if isinstance(loss, CacheConsistencyLoss):
        slots = min(max(round(loss.cache_ratio * case[0].shape[-1]), 1), case[1])
        if not routing.tokens:
            return []
        return [
            (
                lambda soft: relaxed_hit_rate(soft, *case, slots, *routing.arrays),
                lru_worth_oracle(*case, slots, *routing.arrays),
            )
        ]
    return [
        (lambda soft, m=m: relaxed_srp(soft, *case, m, *routing.arrays), srp_worth_oracle(*case, m, *routing.arrays))
        for m in loss.segment_lengths
        if windows_oracle(m, *routing.arrays)
    ]


def assert_gradient_is_that_of_the_relaxed_objective(loss, routing, seed=0):
    scores = scores_for(routing, seed)
    _, gradient = value_and_gradient(loss, routing, scores)
    at = scores.numpy()
    soft_of = memberships(routing, at, loss.membership, loss.temperature)
    objectives = relaxed_objectives(loss, routing)

    valid = routing.valid.numpy()
    slopes = (soft_of(at) * (1 - soft_of(at))) ** 2 if loss.balance_neutral == "slope" else None

    def relaxed_loss(source):
        soft, total = soft_of(source), 0.0
        for relaxed, worth in objectives:
            total -= relaxed(soft)
            if loss.balance_neutral:
                total += (expert_mean_oracle(worth, valid, slopes) * soft[valid]).sum()
        return total / max(len(objectives), 1)

    rng = np.random.default_rng(seed)
    for _ in range(3):
        direction, step = rng.standard_normal(at.shape), 1e-5
        slope = (relaxed_loss(at + step * direction) - relaxed_loss(at - step * direction)) / (2 * step)
        assert (gradient.numpy() * direction).sum() == pytest.approx(slope, abs=1e-6, rel=1e-5)


MEMBERSHIP = st.sampled_from(
    [("margin", True), ("margin", False), ("margin", "slope"), ("probability", True), ("probability", False)]
)
OPTIONS = st.builds(
    lambda membership, temperature, scope: {
        "membership": membership[0],
        "balance_neutral": membership[1],
        "temperature": temperature,
        "scope": scope,
    },
    MEMBERSHIP,
    st.sampled_from([0.3, 1.0, 2.0]),
    st.sampled_from(["global", "batch"]),
)


@pytest.mark.filterwarnings("ignore:invalid value")  # the oracle's K = E: an edge at minus infinity
@given(SMALL, LENGTHS, OPTIONS)
@settings(max_examples=EXAMPLES)
def test_srp_gradient_is_that_of_the_relaxed_objective(routing, lengths, options):
    assert_gradient_is_that_of_the_relaxed_objective(LocalConsistencyLoss(lengths, **options), routing)


@pytest.mark.filterwarnings("ignore:invalid value")
@given(SMALL, st.sampled_from([0.4, 1.0, 2.0, 9.0]), OPTIONS)
@settings(max_examples=EXAMPLES)
def test_cache_gradient_is_that_of_the_relaxed_objective(routing, cache_ratio, options):
    assert_gradient_is_that_of_the_relaxed_objective(CacheConsistencyLoss(cache_ratio, **options), routing)


def test_marginals_are_the_derivative_of_srp_at_fixed_sets():
    """The envelope theorem's own claim, entry by entry: the ratio itself is differentiated, at the hard activations."""
    _, ids = random_routing(2, 9, 5, 2)
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[1, 6:] = False
    document_ids = torch.tensor([[0] * 5 + [1] * 4, [0] * 9])
    m, arrays = 3, (valid.numpy(), document_ids.numpy())
    active = active_experts(ids, 5, valid)
    position = RoutingTrace([ids], 5, valid=valid, document_ids=document_ids).positions
    counts = window_sums(running_sums(active), m)
    histogram = functional.count_histogram(counts, window_ends(position, m), m, by_row=False)
    marginals = functional.srp_marginals(counts, position, histogram, m)
    expected = central_differences(
        lambda a: srp_at_fixed_sets(a, ids.numpy(), 5, m, *arrays), active.double().numpy(), step=1e-6
    )
    np.testing.assert_allclose(marginals.marginal.numpy(), expected, atol=1e-6)
    assert marginals.value.item() == pytest.approx(srp_at_fixed_sets(active.numpy(), ids.numpy(), 5, m, *arrays))


def test_a_gradient_step_raises_srp():
    """What all this is for: descent on the logits makes the routing more consistent."""
    logits, _ = random_routing(2, 64, 8, 2, stickiness=0.3)
    loss = LocalConsistencyLoss((4, 16))
    values = []
    for _ in range(30):
        leaf = logits.clone().requires_grad_()
        value = loss(RoutingTrace([leaf.topk(2).indices], 8, logits=[leaf]))
        value.backward()
        values.append(value.item())
        logits = logits - 100 * leaf.grad
    assert values[-1] < 0.7 * values[0]


def test_the_gradient_scales_with_the_weight():
    logits, ids = random_routing(2, 12, 5, 2)
    gradients = []
    for weight in (1.0, -3.0):
        leaf = logits.clone().requires_grad_()
        (weight * LocalConsistencyLoss((4,))(RoutingTrace([ids], 5, logits=[leaf]))).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[1], -3 * gradients[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("membership", ["margin", "probability"])
def test_half_precision_keeps_small_gradients_under_a_loss_scale(dtype, membership):
    """Each entry is near 1e-7 here: below what fp16 can hold before, above what it can hold after the loss scale."""
    logits, ids = random_routing(8, 512, 32, 4)
    loss = LocalConsistencyLoss(membership=membership)
    exact = logits.to(dtype).float().requires_grad_()
    (2 * loss(RoutingTrace([ids], 32, logits=[exact]))).backward()
    half = logits.to(dtype).requires_grad_()
    (2 * 65536.0 * loss(RoutingTrace([ids], 32, logits=[half]))).backward()
    assert half.grad.isfinite().all()
    error = (half.grad.float() / 65536 - exact.grad).norm() / exact.grad.norm()
    assert error < torch.finfo(dtype).eps


# --- balance-neutrality -------------------------------------------------------------------------------------------


@given(SMALL, st.sampled_from(ANY_LOSS), st.sampled_from(["batch", "sequence"]))
@settings(max_examples=EXAMPLES)
def test_neutral_marginals_of_an_expert_sum_to_zero(routing, case, scope):
    kind, options = case.values
    assume(routing.expert_ids.shape[-1] < routing.num_experts)  # K = E has no slope to divide by
    scores = scores_for(routing)
    _, gradient = value_and_gradient(kind(**options, balance_neutral=True, scope=scope), routing, scores)
    ids = routing.expert_ids.masked_fill(~routing.valid[:, :, None], 0)
    soft = functional.margin_membership(scores, ids)
    worth = (-gradient / (soft * (1 - soft))).masked_fill(~routing.valid[:, :, None], 0)
    total = worth.sum(dim=(0, 1) if scope == "batch" else 1)
    assert total.abs().max() < 1e-5


@given(SMALL, st.sampled_from(ANY_LOSS))
@settings(max_examples=EXAMPLES)
def test_slope_neutral_steps_leave_the_soft_usage_of_every_expert(routing, case):
    kind, options = case.values
    scores = scores_for(routing)
    _, gradient = value_and_gradient(kind(**options, balance_neutral="slope"), routing, scores)
    soft_of = memberships(routing, scores.numpy(), "margin", 1.0)

    def soft_usage(step):
        return soft_of(scores.numpy() - step * gradient.numpy())[routing.valid.numpy()].sum(axis=0)

    step = 1e-3
    assert np.abs((soft_usage(step) - soft_usage(-step)) / (2 * step)).max(initial=0) < 1e-5


def test_without_neutrality_the_soft_usage_would_move():
    """The two tests above would pass on a loss without gradient: here is what they rule out."""
    logits, ids = random_routing(2, 24, 6, 2)
    skewed = logits + torch.arange(6) / 2
    ids = skewed.topk(2).indices
    moved = {}
    for neutral in (False, "slope"):
        leaf = skewed.double().requires_grad_()
        LocalConsistencyLoss((4,), balance_neutral=neutral)(RoutingTrace([ids], 6, logits=[leaf])).backward()
        soft = functional.margin_membership(skewed.double(), ids)
        moved[neutral] = (-leaf.grad * soft * (1 - soft)).sum(dim=(0, 1)).abs().max().item()
    assert moved[False] > 1e-3
    assert moved["slope"] < 1e-6 * moved[False] + 1e-8


# --- padding and documents ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "options"), ANY_LOSS)
@pytest.mark.parametrize("more", ANY_OPTIONS)
def test_padding_neither_gets_nor_changes_a_gradient(kind, options, more):
    logits, ids = random_routing(3, 17, 5, 2)
    valid = torch.rand(3, 17, generator=torch.Generator().manual_seed(1)) < 0.7
    junk = ((0.0, 0), (float("nan"), -100), (float("-inf"), 10**6), (float("inf"), 3), (1e4, 1))
    gradient = assert_padding_has_no_effect(kind(**options, **more), logits, ids, 5, valid, junk)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize(("kind", "options"), ANY_LOSS)
@pytest.mark.parametrize("neutral", [True, False, "slope"])
@pytest.mark.parametrize("boundary", [1, 2, 5, 11, 16])
def test_documents_packed_in_one_row_are_as_good_as_rows_of_their_own(kind, options, neutral, boundary):
    T = 17
    logits, ids = random_routing(1, T, 5, 2)
    loss = kind(**options, balance_neutral=neutral)
    packed = logits.clone().requires_grad_()
    document_ids = (torch.arange(T) >= boundary).long()[None]
    in_one_row = loss(RoutingTrace([ids], 5, logits=[packed], document_ids=document_ids))
    in_one_row.backward()

    leaf = logits.clone().requires_grad_()
    row_ids = torch.zeros(2, T, 2, dtype=torch.int64)
    row_logits = torch.zeros(2, T, 5)
    valid = torch.zeros(2, T, dtype=torch.bool)
    for row, part in enumerate((slice(0, boundary), slice(boundary, T))):
        length = part.stop - part.start
        row_ids[row, :length] = ids[0, part]
        row_logits[row, :length] = leaf[0, part]
        valid[row, :length] = True
    in_rows = loss(RoutingTrace([row_ids], 5, logits=[row_logits], valid=valid))
    in_rows.backward()
    assert in_one_row.item() == in_rows.item()
    torch.testing.assert_close(packed.grad, leaf.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("kind", "options"), ANY_LOSS)
def test_two_equal_documents_side_by_side_share_the_gradient_of_one(kind, options):
    logits, ids = random_routing(1, 12, 5, 2)
    loss = kind(**options)
    alone = logits.clone().requires_grad_()
    loss(RoutingTrace([ids], 5, logits=[alone])).backward()
    both = torch.cat([logits, logits], dim=1).requires_grad_()
    document_ids = torch.tensor([[0] * 12 + [1] * 12])
    loss(RoutingTrace([torch.cat([ids, ids], dim=1)], 5, logits=[both], document_ids=document_ids)).backward()
    torch.testing.assert_close(both.grad, torch.cat([alone.grad, alone.grad], dim=1) / 2, rtol=1e-5, atol=1e-8)


# --- extreme scores -----------------------------------------------------------------------------------------------


@given(SMALL, st.sampled_from(ANY_LOSS), st.sampled_from(ANY_OPTIONS), st.sampled_from([1e-30, 1.0, 1e4, 1e30]))
@settings(max_examples=EXAMPLES)
def test_gradients_are_finite(routing, case, more, size):
    kind, options = case.values
    scores = (scores_for(routing) * size).float()
    scores[:, ::2] = 0  # ties at the edge
    value, gradient = value_and_gradient(kind(**options, **more), routing, scores)
    assert value.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("neutral", [True, "slope"])
def test_experts_that_the_router_rules_out_get_no_gradient(neutral):
    logits, _ = random_routing(2, 12, 8, 2)
    scores = logits.clone()
    scores[:, ::2, :4] = -torch.inf  # group-limited selection
    scores[:, 1::2, 4:] = -torch.inf
    ids = scores.topk(2).indices
    leaf = scores.clone().requires_grad_()
    LocalConsistencyLoss((4,), balance_neutral=neutral)(RoutingTrace([ids], 8, scores=[leaf])).backward()
    assert (leaf.grad[scores.isinf()] == 0).all()
    assert leaf.grad.isfinite().all()
    assert leaf.grad.abs().max() > 0


def test_only_two_experts_left_and_both_chosen_have_no_edge():
    scores = torch.full((1, 6, 4), -torch.inf)
    scores[:, :, :2] = torch.randn(1, 6, 2)
    leaf = scores.clone().requires_grad_()
    LocalConsistencyLoss((2,))(RoutingTrace([scores.topk(2).indices], 4, scores=[leaf])).backward()
    assert (leaf.grad == 0).all()


# --- scopes -------------------------------------------------------------------------------------------------------


@given(SMALL, st.integers(2, 5), st.sampled_from(["margin", "probability"]), st.booleans())
@settings(max_examples=EXAMPLES)
def test_sequence_scope_is_the_mean_of_the_rows_that_have_a_segment(routing, m, membership, neutral):
    rows = sorted({n for n, _ in windows_oracle(m, *routing.arrays)})
    assume(rows)
    scores = scores_for(routing)
    loss = LocalConsistencyLoss((m,), membership=membership, balance_neutral=neutral, scope="sequence")
    value, gradient = value_and_gradient(loss, routing, scores)
    leaf = scores.clone().requires_grad_()
    alone = [
        loss(
            RoutingTrace(
                [routing.expert_ids[n : n + 1]],
                routing.num_experts,
                logits=[leaf[n : n + 1]],
                **{name: mask[n : n + 1] for name, mask in routing.masks.items()},
            )
        )
        for n in rows
    ]
    mean = sum(alone) / len(alone)
    mean.backward()
    assert value.item() == pytest.approx(mean.item(), abs=1e-12)
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-5, atol=1e-9)


GLOBAL_LOSSES = [
    (LocalConsistencyLoss, {"segment_lengths": (4, 16)}),
    (LocalConsistencyLoss, {"segment_lengths": (4, 16), "balance_neutral": "slope"}),
    (LocalConsistencyLoss, {"segment_lengths": (4, 16), "membership": "probability"}),
    (CacheConsistencyLoss, {}),
]


def losses_of_one_half(rank, logits, ids, valid):
    """What a process sees: its half of the rows, [(value, gradient by all rows)] for each loss."""
    half = slice(rank * 2, rank * 2 + 2)
    return [results_of(kind(**options), logits, ids, valid, half) for kind, options in GLOBAL_LOSSES]


def results_of(loss, logits, ids, valid, rows=slice(None)):
    leaf = logits.clone().requires_grad_()
    value = loss(RoutingTrace([ids[rows]], logits.shape[-1], logits=[leaf[rows]], valid=valid[rows]))
    value.backward()
    return value.detach(), leaf.grad


def test_global_scope_on_two_processes_equals_one_process_with_the_whole_batch(tmp_path):
    """Data-parallel training averages the gradients; the halves hold different numbers of tokens."""
    logits, ids = random_routing(4, 21, 6, 2)
    valid = torch.ones(4, 21, dtype=torch.bool)
    valid[0, 9:] = False
    valid[3] = False
    halves = on_processes(2, losses_of_one_half, tmp_path, logits, ids, valid)
    for (kind, options), first, second in zip(GLOBAL_LOSSES, *halves, strict=True):
        value, gradient = results_of(kind(**options), logits, ids, valid)
        assert first[0] == second[0] == value
        torch.testing.assert_close((first[1] + second[1]) / 2, gradient, rtol=1e-4, atol=1e-8)


def losses_of_own_rows(rank, rows, lengths):
    """What a process sees whose rows are as long as its text: alone it would stack more layers the shorter they are."""
    consistency.STACKED = max(lengths) * 6 * 2
    own = [(logits[rank : rank + 1, : lengths[rank]], ids[rank : rank + 1, : lengths[rank]]) for logits, ids in rows]
    return [results_of_layers(kind(**options), own, None) for kind, options in GLOBAL_LOSSES]


def results_of_layers(loss, layers, valid):
    leaves = [logits.clone().requires_grad_() for logits, _ in layers]
    values = loss.per_layer(RoutingTrace([ids for _, ids in layers], 6, logits=leaves, valid=valid))
    values.sum().backward()
    return values.detach(), [leaf.grad for leaf in leaves]


def test_processes_whose_rows_differ_in_length_sum_the_same_layers(tmp_path):
    lengths = (40, 12)
    layers = [random_routing(2, 40, 6, 2, seed=seed) for seed in range(5)]
    valid = torch.arange(40) < torch.tensor(lengths)[:, None]
    per_rank = on_processes(2, losses_of_own_rows, tmp_path, layers, lengths)
    for (kind, options), *ranks in zip(GLOBAL_LOSSES, *per_rank, strict=True):
        values, gradients = results_of_layers(kind(**options), layers, valid)
        for rank, (own_values, own_gradients) in enumerate(ranks):
            assert torch.equal(own_values, values)
            for own, whole in zip(own_gradients, gradients, strict=True):
                torch.testing.assert_close(own[0] / 2, whole[rank, : lengths[rank]], rtol=1e-4, atol=1e-8)


def test_a_segment_longer_than_a_small_integer_is_counted():
    ids = (torch.arange(40_000)[None, :, None] < 36_000).long()
    trace = RoutingTrace([ids], 2, logits=[torch.zeros(1, 40_000, 2)])
    assert LocalConsistencyLoss((35_000,))(trace).item() == pytest.approx(1 - float(srp([ids], 2, 35_000).srp))


# --- memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("membership", ["margin", "probability"])
@pytest.mark.parametrize("kind", [LocalConsistencyLoss, CacheConsistencyLoss])
def test_memory_stays_below_twice_the_router_scores(kind, membership):
    logits, ids = random_routing(8, 512, 32, 4)
    layers = [logits.clone().requires_grad_() for _ in range(4)]
    trace = RoutingTrace([ids] * 4, 32, logits=layers)
    loss = kind(membership=membership)
    loss(trace)  # what the first call alone needs is not counted
    scores = sum(layer.numel() * layer.element_size() for layer in layers)
    assert peak_bytes(lambda: loss(trace)) < 2 * scores


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (
            LocalConsistencyLoss,
            {"segment_lengths": (1, 4)},
            r"segment_lengths must be a list of distinct integers.*\(1, 4\)",
        ),
        (LocalConsistencyLoss, {"segment_lengths": ()}, r"segment_lengths must be a list of distinct integers.*\(\)"),
        (LocalConsistencyLoss, {"segment_lengths": (4, 4)}, "segment_lengths must be a list of distinct"),
        (LocalConsistencyLoss, {"segment_lengths": (4.0,)}, "segment_lengths must be a list of distinct integers"),
        (LocalConsistencyLoss, {"segment_lengths": 1}, "segment_lengths must be an integer of at least 2, got 1"),
        (LocalConsistencyLoss, {"segment_lengths": (True, 4)}, "segment_lengths must be a list of distinct integers"),
        (LocalConsistencyLoss, {"temperature": 0.0}, "temperature must be a positive number, got 0.0"),
        (LocalConsistencyLoss, {"temperature": float("nan")}, "temperature must be a positive number, got nan"),
        (
            LocalConsistencyLoss,
            {"balance_neutral": "yes"},
            "balance_neutral must be True, False, 'slope' or None, got 'yes'",
        ),
        (
            LocalConsistencyLoss,
            {"balance_neutral": "slope", "membership": "probability"},
            "balance_neutral='slope' needs membership='margin'",
        ),
        (LocalConsistencyLoss, {"membership": "softmax"}, "membership must be one of.*got 'softmax'"),
        (LocalConsistencyLoss, {"scope": "world"}, "scope must be one of.*got 'world'"),
        (CacheConsistencyLoss, {"cache_ratio": 0}, "cache_ratio must be a positive number, got 0"),
        (CacheConsistencyLoss, {"cache_ratio": float("nan")}, "cache_ratio must be a positive number, got nan"),
        (CacheConsistencyLoss, {"temperature": -1.0}, "temperature must be a positive number, got -1.0"),
        (CacheConsistencyLoss, {"scope": None}, "scope must be one of.*got None"),
    ],
)
def test_wrong_options_are_refused(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(**arguments)


@pytest.mark.parametrize("kind", [LocalConsistencyLoss, CacheConsistencyLoss])
def test_a_trace_without_scores_is_refused(kind):
    ids = random_routing(1, 6, 4, 2)[1]
    with pytest.raises(ValueError, match=r"layer_00.*needs the router's scores"):
        kind()(RoutingTrace([ids], 4))
    with pytest.raises(ValueError, match=r"layer_00.*membership='probability' needs the router's logits"):
        kind(membership="probability")(RoutingTrace([ids], 4, scores=[torch.zeros(1, 6, 4)]))
