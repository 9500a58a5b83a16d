"""Load balance and z-loss: the literal formulas, what each scope counts, an average that survives a restart."""

import copy
import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from padding import assert_padding_has_no_effect
from processes import on_processes
from reference import central_differences, load_balance_oracle, softmax, usage_share_oracle
from strategies import routings

from consistency_reg import LoadBalanceLoss, RouterZLoss, RoutingTrace

SCOPES = ["global", "batch", "sequence"]


def case(routing, seed=0):
    """Random float64 logits for a routing, and the trace."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*routing.valid.shape, routing.num_experts, generator=generator, dtype=torch.float64)
    return logits, RoutingTrace([routing.expert_ids], routing.num_experts, logits=[logits], **routing.masks)


def random_trace(B=3, T=7, E=5, K=2, seed=0, skew=0.0, valid=None):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(B, T, E, generator=generator, dtype=torch.float64) + skew * torch.arange(E)
    return RoutingTrace([logits.topk(K).indices], E, logits=[logits], valid=valid)


def share_of(*traces):
    """[E] the usage of several batches counted together."""
    ids = np.concatenate([trace.layers[0].expert_ids.numpy().reshape(-1, 2) for trace in traces])[None]
    valid = np.concatenate([trace.valid_mask.numpy().reshape(-1) for trace in traces])[None]
    return usage_share_oracle(ids, traces[0].layers[0].num_experts, valid)


def expected_loss(share, trace):
    layer = trace.layers[0]
    return load_balance_oracle(share, softmax(layer.logits.numpy()), layer.top_k, trace.valid_mask.numpy())


# --- the formula --------------------------------------------------------------------------------------------------


@given(routings(), st.sampled_from(["global", "batch"]), st.booleans())
@settings(max_examples=60)
def test_the_batch_is_counted_as_one(routing, scope, training):
    logits, trace = case(routing)
    share = usage_share_oracle(routing.expert_ids.numpy(), routing.num_experts, routing.valid.numpy())
    expected = load_balance_oracle(share, softmax(logits.numpy()), routing.expert_ids.shape[-1], routing.valid.numpy())
    assert LoadBalanceLoss(scope).train(training)(trace).item() == pytest.approx(expected, rel=1e-6)


@given(routings(), st.booleans())
@settings(max_examples=60)
def test_sequence_scope_is_the_mean_over_rows_with_tokens(routing, training):
    logits, trace = case(routing)
    rows = []
    for n in np.flatnonzero(routing.valid.numpy().any(axis=1)):
        row = slice(n, n + 1)
        ids, valid = routing.expert_ids.numpy()[row], routing.valid.numpy()[row]
        share = usage_share_oracle(ids, routing.num_experts, valid)
        rows.append(load_balance_oracle(share, softmax(logits.numpy()[row]), ids.shape[-1], valid))
    expected = np.mean(rows) if rows else 0.0
    assert LoadBalanceLoss("sequence").train(training)(trace).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("scope", SCOPES)
def test_uniform_usage_costs_one_and_collapse_costs_most(scope):
    E, K = 6, 2
    cycle = torch.stack([torch.arange(12) * K % E, (torch.arange(12) * K + 1) % E], dim=-1)[None]
    even = RoutingTrace([cycle], E, logits=[torch.zeros(1, 12, E)])
    assert LoadBalanceLoss(scope)(even).item() == pytest.approx(1.0)
    collapsed_logits = torch.tensor([50.0, 50.0, 0, 0, 0, 0]).expand(1, 12, E)
    collapsed = RoutingTrace([collapsed_logits.topk(K).indices], E, logits=[collapsed_logits])
    assert LoadBalanceLoss(scope)(collapsed).item() == pytest.approx(E / K)


@pytest.mark.parametrize("scope", SCOPES)
def test_the_gradient_goes_through_the_probabilities_alone(scope):
    trace = random_trace(valid=torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [0] * 2 + [1] * 5]).bool())
    layer, valid = trace.layers[0], trace.valid_mask.numpy()
    leaf = layer.logits.clone().requires_grad_()
    LoadBalanceLoss(scope)(RoutingTrace([layer.expert_ids], 5, logits=[leaf], valid=trace.valid)).backward()

    def literal(logits):
        p = softmax(logits)
        if scope != "sequence":
            return load_balance_oracle(share_of(trace), p, 2, valid)
        rows = [slice(n, n + 1) for n in range(3)]
        ids = layer.expert_ids.numpy()
        shares = [usage_share_oracle(ids[row], 5, valid[row]) for row in rows]
        return np.mean([load_balance_oracle(s, p[row], 2, valid[row]) for s, row in zip(shares, rows, strict=True)])

    np.testing.assert_allclose(leaf.grad.numpy(), central_differences(literal, layer.logits.numpy()), atol=1e-7)
    assert (leaf.grad[~trace.valid] == 0).all()


def test_layers_are_not_pooled():
    """Two layers that collapse on different experts: pooled they would look even."""
    left = torch.tensor([9.0, 9.0, 0.0, 0.0]).expand(1, 8, 4)
    right = left.flip(-1)
    trace = RoutingTrace([left.topk(2).indices, right.topk(2).indices], 4, logits=[left, right])
    per_layer = LoadBalanceLoss("batch").per_layer(trace)
    assert per_layer.tolist() == pytest.approx([2.0, 2.0], abs=1e-3)
    assert LoadBalanceLoss("batch")(trace).item() == pytest.approx(2.0, abs=1e-3)


def test_layers_may_differ_in_size():
    small, large = random_trace(E=4, K=2), random_trace(E=9, K=3, seed=1)
    both = RoutingTrace([small.expert_ids[0], large.expert_ids[0]], [4, 9], logits=[small.logits[0], large.logits[0]])
    loss = LoadBalanceLoss("batch")
    assert loss.per_layer(both).tolist() == [loss(small).item(), loss(large).item()]


@pytest.mark.parametrize("scope", SCOPES)
def test_layers_that_are_worked_on_together_have_what_each_has_alone(scope):
    options = {"running": 0.6, "accumulation_steps": 2}
    together, alone = LoadBalanceLoss(scope, **options), [LoadBalanceLoss(scope, **options) for _ in range(4)]
    for step in range(5):
        each = [random_trace(E=E, seed=10 * step + E, skew=0.3) for E in (5, 6, 6, 5)]
        each[3] = random_trace(E=5, seed=step, skew=-0.5)
        trace = RoutingTrace(
            [one.expert_ids[0] for one in each], [5, 6, 6, 5], logits=[one.logits[0].requires_grad_() for one in each]
        )
        values = together.per_layer(trace)
        gradients = torch.autograd.grad(values.sum(), trace.logits)
        for loss, one, value, gradient in zip(alone, each, values, gradients, strict=True):
            leaf = one.logits[0].detach().requires_grad_()
            expected = loss(RoutingTrace(one.expert_ids, one.num_experts, logits=[leaf]))
            expected.backward()
            assert value.item() == expected.item()
            assert torch.equal(gradient, leaf.grad)


def test_layers_of_one_shape_send_one_message(monkeypatch):
    sent = []
    monkeypatch.setattr("consistency_reg.losses.balance.all_sum", lambda *tensors: sent.append(tensors) or tensors)
    one = random_trace()
    LoadBalanceLoss("global")(RoutingTrace(one.expert_ids * 6, 5, logits=one.logits * 6))
    assert len(sent) == 2, "usage, and the routers' probabilities"


def test_sigmoid_routers_are_balanced_by_their_own_weights():
    logits = torch.randn(2, 5, 4, dtype=torch.float64)
    trace = RoutingTrace([logits.topk(2).indices], 4, logits=[logits], score_functions=["sigmoid"])
    weights = 1 / (1 + np.exp(-logits.numpy()))
    expected = load_balance_oracle(
        share_of(trace), weights / weights.sum(-1, keepdims=True), 2, np.ones((2, 5), dtype=bool)
    )
    assert LoadBalanceLoss("batch")(trace).item() == pytest.approx(expected)


@pytest.mark.parametrize("loss", [*map(LoadBalanceLoss, SCOPES), RouterZLoss(), LoadBalanceLoss("sequence", 0.5)])
def test_padding_has_no_effect_whatever_it_holds(loss):
    plain = random_trace()
    valid = torch.rand(3, 7, generator=torch.Generator().manual_seed(1)) < 0.7
    junk = ((0.0, 0), (float("nan"), -100), (float("inf"), 10**6), (-1e4, 3))
    assert_padding_has_no_effect(loss, plain.logits[0], plain.expert_ids[0], 5, valid, junk)


@pytest.mark.parametrize("loss", [*map(LoadBalanceLoss, SCOPES), RouterZLoss()])
def test_a_batch_of_padding_costs_nothing(loss):
    trace = random_trace(valid=torch.zeros(3, 7, dtype=torch.bool))
    leaf = trace.logits[0].requires_grad_()
    value = loss(trace)
    value.backward()
    assert value.item() == 0
    assert (leaf.grad == 0).all()


# --- running average ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["global", "batch"])
@pytest.mark.parametrize("running", [0.5, 0.95])
def test_running_average_is_the_debiased_formula(scope, running):
    loss = LoadBalanceLoss(scope, running)
    traces = [random_trace(seed=seed, skew=0.3 * seed) for seed in range(6)]
    for n, trace in enumerate(traces):
        shares = [share_of(past) for past in traces[: n + 1]]
        weights = [(1 - running) * running ** (n - i) for i in range(n + 1)]
        average = sum(w * share for w, share in zip(weights, shares, strict=True)) / sum(weights)
        assert loss(trace).item() == pytest.approx(expected_loss(average, trace), rel=1e-5)


def test_running_average_with_sequence_scope_mixes_each_row_with_the_past():
    running, loss = 0.8, LoadBalanceLoss("sequence", 0.8)
    first, second = random_trace(seed=0), random_trace(seed=1, skew=0.5)
    loss(first)
    layer, valid = second.layers[0], np.ones((1, 7), dtype=bool)
    rows = []
    for n in range(3):
        own = usage_share_oracle(layer.expert_ids[n : n + 1].numpy(), 5, valid)
        share = (running * share_of(first) + own) / (running + 1)
        rows.append(load_balance_oracle(share, softmax(layer.logits[n : n + 1].numpy()), 2, valid))
    assert loss(second).item() == pytest.approx(np.mean(rows), rel=1e-5)


def test_first_step_of_a_running_average_is_the_batch():
    trace = random_trace()
    assert LoadBalanceLoss("batch", 0.99)(trace).item() == pytest.approx(
        LoadBalanceLoss("batch")(trace).item(), rel=1e-6
    )


def test_a_step_of_padding_leaves_the_average_where_it_is():
    with_gap, without = LoadBalanceLoss("batch", 0.5), LoadBalanceLoss("batch", 0.5)
    first, last = random_trace(seed=0), random_trace(seed=1)
    with_gap(first)
    without(first)
    with_gap(random_trace(valid=torch.zeros(3, 7, dtype=torch.bool)))
    assert with_gap(last).item() == without(last).item()


@pytest.mark.parametrize("scope", SCOPES)
def test_evaluation_uses_its_own_batch_and_leaves_no_trace(scope):
    loss, undisturbed = LoadBalanceLoss(scope, 0.9), LoadBalanceLoss(scope, 0.9)
    first, other, last = (random_trace(seed=seed, skew=seed) for seed in range(3))
    loss(first)
    undisturbed(first)
    loss.eval()
    assert loss(other).item() == LoadBalanceLoss(scope).eval()(other).item()
    loss.train()
    assert loss(last).item() == undisturbed(last).item()


# --- accumulation -------------------------------------------------------------------------------------------------


def test_global_scope_counts_the_micro_batches_so_far():
    loss = LoadBalanceLoss("global", accumulation_steps=3)
    traces = [random_trace(seed=seed, skew=seed / 2) for seed in range(6)]
    for n, trace in enumerate(traces):
        so_far = traces[n - n % 3 : n + 1]
        assert loss(trace).item() == pytest.approx(expected_loss(share_of(*so_far), trace), rel=1e-6)


def test_batch_scope_counts_each_micro_batch_by_itself():
    loss = LoadBalanceLoss("batch", accumulation_steps=3)
    for seed in range(4):
        trace = random_trace(seed=seed, skew=seed / 2)
        assert loss(trace).item() == pytest.approx(expected_loss(share_of(trace), trace), rel=1e-6)


def test_the_running_average_moves_once_for_each_optimizer_step():
    running, loss = 0.7, LoadBalanceLoss("global", 0.7, accumulation_steps=2)
    traces = [random_trace(seed=seed, skew=seed / 2) for seed in range(4)]
    for trace in traces[:3]:
        loss(trace)
    past, present = share_of(*traces[:2]), share_of(*traces[2:])
    average = (running * past + present) / (running + 1)
    assert loss(traces[3]).item() == pytest.approx(expected_loss(average, traces[3]), rel=1e-5)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_step_may_end_before_its_last_micro_batch(scope):
    """A remainder of one micro-batch counts as the step of one that is told so from the start."""
    loss, told = (LoadBalanceLoss(scope, 0.7, accumulation_steps=steps) for steps in (3, 1))
    first, last = random_trace(seed=0), random_trace(seed=1, skew=0.5)
    loss(first)
    told(first)
    loss.end_step()
    assert loss(last).item() == told(last).item()


def test_ending_a_step_that_has_ended_changes_nothing():
    loss, left_alone = (LoadBalanceLoss("global", 0.7, accumulation_steps=2) for _ in range(2))
    for n, trace in enumerate(random_trace(seed=seed, skew=seed / 2) for seed in range(5)):
        assert loss(trace).item() == left_alone(trace).item()
        loss.eval()(trace)
        loss.train()
        if n % 2:
            loss.end_step()
            loss.end_step()


# --- state --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_a_run_that_is_stopped_and_resumed_equals_one_that_is_not(scope, stop):
    """Also in the middle of an accumulation; through a file, as weights only."""
    traces = [random_trace(seed=seed, skew=seed / 3) for seed in range(7)]
    options = {"scope": scope, "running": 0.9, "accumulation_steps": 2}
    straight, first = LoadBalanceLoss(**options), LoadBalanceLoss(**options)
    expected = [straight(trace).item() for trace in traces]
    values = [first(trace).item() for trace in traces[:stop]]
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = LoadBalanceLoss(**options)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert values + [second(trace).item() for trace in traces[stop:]] == expected


def test_a_state_dict_is_a_snapshot():
    loss = LoadBalanceLoss("batch", 0.9, accumulation_steps=2)
    for seed in range(3):
        loss(random_trace(seed=seed))
    state = loss.state_dict()
    before = copy.deepcopy(state)
    for seed in range(5):
        loss(random_trace(seed=seed, skew=1.0))
    torch.testing.assert_close(state, before, rtol=0, atol=0)


# --- processes ----------------------------------------------------------------------------------------------------


def one_half(rank, logits, ids, valid, running):
    """What a process sees of three steps: [(value, gradient by all rows)]."""
    rows = slice(rank * 2, rank * 2 + 2)
    loss = LoadBalanceLoss("global", running)
    return [step_of(loss, step, logits, ids, valid, rows) for step in range(3)]


def step_of(loss, step, logits, ids, valid, rows=slice(None)):
    leaf = logits[step].clone().requires_grad_()
    valid = valid[step][rows]
    value = loss(RoutingTrace([ids[step][rows]], logits.shape[-1], logits=[leaf[rows]], valid=valid))
    value.backward()
    return value.detach(), leaf.grad


def test_global_scope_on_two_processes_equals_one_process_with_the_whole_batch(tmp_path):
    """With as many valid tokens on both, with few on one of them, with none on one of them."""
    logits = torch.randn(3, 4, 6, 5, generator=torch.Generator().manual_seed(0)) + torch.arange(5) / 2
    ids, valid = logits.topk(2).indices, torch.ones(3, 4, 6, dtype=torch.bool)
    valid[1, 1, 1:] = valid[1, 2, :4] = valid[1, 3] = False
    valid[2, :2] = False
    halves = on_processes(2, one_half, tmp_path, logits, ids, valid, 0.5)
    whole = LoadBalanceLoss("global", 0.5)
    for step in range(3):
        value, gradient = step_of(whole, step, logits, ids, valid)
        first, second = halves[0][step], halves[1][step]
        torch.testing.assert_close((first[0], second[0]), (value, value))
        torch.testing.assert_close((first[1] + second[1]) / 2, gradient, rtol=1e-5, atol=1e-8)


# --- z-loss -------------------------------------------------------------------------------------------------------


@given(routings())
@settings(max_examples=40)
def test_z_loss_is_the_mean_square_of_the_log_partition(routing):
    logits, trace = case(routing)
    tokens = np.argwhere(routing.valid.numpy())
    expected = np.mean([np.log(np.exp(logits[n, t].numpy()).sum()) ** 2 for n, t in tokens]) if len(tokens) else 0.0
    assert RouterZLoss()(trace).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_worked_on_in_fp32(dtype):
    logits = (torch.randn(2, 9, 5) * 20).to(dtype)
    ids = logits.topk(2).indices
    for loss in (RouterZLoss(), LoadBalanceLoss("batch")):
        half = loss(RoutingTrace([ids], 5, logits=[logits]))
        assert half.dtype == torch.float32
        assert half.item() == loss(RoutingTrace([ids], 5, logits=[logits.float()])).item()


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scope": "world"}, r"scope must be one of .*got 'world'"),
        ({"running": 1.0}, r"running must lie in \[0, 1\), got 1.0"),
        ({"running": -0.1}, r"running must lie in \[0, 1\), got -0.1"),
        ({"running": float("nan")}, r"running must lie in \[0, 1\), got nan"),
        ({"accumulation_steps": 0}, "accumulation_steps must be at least 1, got 0"),
    ],
)
def test_wrong_options_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        LoadBalanceLoss(**arguments)


@pytest.mark.parametrize("loss", [LoadBalanceLoss(), RouterZLoss()])
def test_a_trace_without_logits_is_refused(loss):
    with pytest.raises(ValueError, match=r"layer_00.*needs the router's logits"):
        loss(RoutingTrace([torch.tensor([[[0, 1]]])], 3, scores=[torch.zeros(1, 1, 3)]))
