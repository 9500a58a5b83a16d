"""The published losses: values by hand, against literal oracles, their gradients, and what must not reach them."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference import adjacent_oracle, bles_oracle, documents, melinoe_oracle, remoe_oracle, softmax, sticky_oracle
from strategies import routings

from consistency_reg.functional.melinoe import discounted_sums, soft_cache
from consistency_reg.losses import (
    LOCALITY_LOSSES,
    AdjacentLoss,
    MelinoeLoss,
    ReMoELoss,
    RoutingLoss,
    StickyLoss,
    make_loss,
)
from consistency_reg.routing import RoutingTrace

PUBLISHED = ("remoe", "sticky", "adjacent", "melinoe", "bles")
# short distances and windows, so that the small cases of hypothesis have some of each
OPTIONS = {
    "remoe": {"smooth": 0.3, "lag": 0.7, "working_set": 0.2, "distances": (1, 2, 5), "window": 3},
    "sticky": {"smooth": 0.6, "anchor": 1.7, "window": 3},
    "adjacent": {},
    "bles": {"temperature": 0.7},
    "melinoe": {"decay": 0.8, "cache_share": 0.5},
}


def trace_of(logits, expert_ids=None, top_k=1, **masks):
    """A one-layer trace; the router's own top-k where no ids are given."""
    ids = logits.topk(top_k).indices if expert_ids is None else expert_ids
    return RoutingTrace([ids], num_experts=logits.shape[-1], logits=[logits], **masks)


def hard_requests(expert_ids, num_experts, valid):
    hard = np.zeros((*valid.shape, num_experts))
    for n, t in np.argwhere(valid):
        hard[n, t, expert_ids[n, t]] = 1
    return hard


def oracle_of(name, routing, logits, options):
    """The loss as a function of the logits [N, T, E], in NumPy; straight-through functions keep their hard part."""
    masks, ids = routing.arrays, routing.expert_ids.numpy()
    if name == "remoe":
        return lambda z: remoe_oracle(softmax(z), ids, *masks, **options)
    if name == "sticky":
        return lambda z: sticky_oracle(softmax(z), *masks, **options)
    if name == "adjacent":
        return lambda z: adjacent_oracle(softmax(z), *masks)
    if name == "bles":
        return lambda z: bles_oracle(softmax(z / options["temperature"]), ids, *masks)
    E, K = routing.num_experts, ids.shape[-1]
    hard, start = hard_requests(ids, E, masks[0]), softmax(logits)
    through = options.get("through_cache", True)

    def melinoe(z):
        requests = hard + softmax(z) - start
        kept = requests if through else hard
        slots = options["cache_share"] * E
        return melinoe_oracle(requests, kept, *masks, top_k=K, slots=slots, decay=options["decay"])

    return melinoe


@st.composite
def cases(draw):
    routing = draw(routings())
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = rng.normal(size=(*routing.valid.shape, routing.num_experts)) * draw(st.sampled_from([0.1, 1.0, 4.0]))
    return routing, torch.from_numpy(logits)


# --- by hand ------------------------------------------------------------------------------------------------------


def test_remoe_by_hand():
    # p = (3/4, 1/4) throughout: no divergence; rho is 3/4; every window of 2 has the entropy of p
    logits = torch.tensor([[[math.log(3.0), 0.0]] * 4], dtype=torch.float64)
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    loss = ReMoELoss(smooth=5.0, lag=7.0, working_set=0.5, window=2)(trace_of(logits))
    assert loss.item() == pytest.approx(-math.log(0.75) + 0.5 * entropy, abs=1e-7)

    # p flips: rho = 1/4, SymKL = (1/2) ln 3 at distance 1 and 0 at distance 2
    flips = torch.tensor([[[math.log(3.0), 0.0], [0.0, math.log(3.0)], [math.log(3.0), 0.0]]], dtype=torch.float64)
    loss = ReMoELoss(smooth=0.1, lag=0.2, working_set=1.0, distances=(1, 2, 4), window=8)(trace_of(flips))
    sym_kl = 0.5 * math.log(3)
    assert loss.item() == pytest.approx(-math.log(0.25) + 0.1 * sym_kl + 0.2 * sym_kl / 2, abs=1e-7)


def test_remoe_never_goes_below_log_k():
    logits = torch.tensor([[[50.0, 50.0, 0.0, 0.0]] * 8])
    loss = ReMoELoss(smooth=0, lag=0, working_set=0)(trace_of(logits, top_k=2))
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)


def test_sticky_by_hand():
    p = torch.tensor([[[1.0, 0.0], [0.5, 0.5], [0.0, 1.0], [0.0, 1.0]]], dtype=torch.float64)
    trace = trace_of(p.clamp_min(1e-30).log(), top_k=1)
    # steps: 1/2, 1/2, 0; drift from s = 0 at t = 1 (1/3 * 1/2) and t = 2 (2/3 * 2), t = 3 starts the next window
    assert StickyLoss(smooth=1.0, anchor=0.0, window=3)(trace).item() == pytest.approx(1 / 3)
    assert StickyLoss(smooth=0.0, anchor=1.0, window=3)(trace).item() == pytest.approx((1 / 6 + 4 / 3) / 3)


def test_adjacent_by_hand():
    p = torch.tensor([[[1.0, 0.0], [0.25, 0.75], [0.25, 0.75]]], dtype=torch.float64)
    loss = AdjacentLoss()(trace_of(p.clamp_min(1e-30).log()))
    assert loss.item() == pytest.approx(((1 - 0.25) + (1 - 0.0625 - 0.5625)) / 2)


def test_melinoe_by_hand():
    # E = 4, C = 2, K = 1, decay 1/2: c = 1/2 each; then Z = 1, c = (1/4 + r); then Z = 1 again, c = (1/8 + r/2 + r)
    logits = torch.eye(4, dtype=torch.float64)[None, [0, 0, 1]] * 9
    loss = MelinoeLoss(decay=0.5, cache_share=0.5)(trace_of(logits))
    assert loss.item() == pytest.approx(((1 - 1 / 2) + (1 - 5 / 4) + (1 - 1 / 8)) / 3)


def test_a_soft_cache_always_holds_its_slots():
    requests = torch.zeros(2, 200, 8, dtype=torch.float64).scatter(2, torch.randint(8, (2, 200, 1)), 1)
    position = torch.arange(200).expand(2, 200)
    for decay in (0.0, 0.9, 1.0):
        cache = soft_cache(requests, position, slots=3.0, top_k=1, decay=decay)
        assert torch.allclose(cache.sum(-1), torch.full((2, 200), 3.0, dtype=torch.float64))
    assert torch.allclose(soft_cache(requests, position, 3.0, 1, 0.0)[:, 1:], 3 * requests[:, :-1])


def test_discounted_sums_across_chunks():
    torch.manual_seed(0)
    values = torch.randn(2, 300, 3, dtype=torch.float64)
    starts = torch.zeros(2, 300, dtype=torch.bool)
    starts[:, 0] = starts[0, 50] = starts[0, 64] = starts[1, 128] = starts[1, 255] = True
    index = torch.arange(300)
    position = index - torch.where(starts, index, 0).cummax(dim=1).values
    expected = torch.zeros_like(values)
    for n in range(2):
        for t in range(1, 300):
            if not starts[n, t]:
                expected[n, t] = 0.95 * expected[n, t - 1] + values[n, t - 1]
    assert torch.allclose(discounted_sums(values, position, 0.95), expected)


# --- against the oracles ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
@settings(max_examples=150, deadline=None)
@given(case=cases())
def test_value_equals_the_oracle(name, case):
    routing, logits = case
    trace = trace_of(logits, routing.expert_ids, **routing.masks)
    expected = oracle_of(name, routing, logits.numpy(), OPTIONS[name])(logits.numpy())
    assert make_loss(name, **OPTIONS[name])(trace).item() == pytest.approx(expected, abs=1e-9, rel=1e-9)


@pytest.mark.parametrize(
    ("name", "extra"), [*((name, {}) for name in PUBLISHED), ("melinoe", {"through_cache": False})]
)
@settings(max_examples=25, deadline=None)
@given(case=cases())
def test_gradient_equals_finite_differences_of_the_oracle(name, extra, case):
    routing, logits = case
    options = OPTIONS[name] | extra
    leaf = logits.clone().requires_grad_()
    make_loss(name, **options)(trace_of(leaf, routing.expert_ids, **routing.masks)).backward()
    oracle, z, step = oracle_of(name, routing, logits.numpy(), options), logits.numpy().copy(), 1e-5
    rng = np.random.default_rng(0)
    directions = [rng.normal(size=z.shape) for _ in range(3)]
    for direction in directions:
        before, here, after = (oracle(z + by * direction) for by in (-step, 0, step))
        slope = (after - before) / (2 * step)
        # an absolute difference of the loss turns within the step: there is no slope to compare with
        assume(after - here == pytest.approx(here - before, abs=1e-9, rel=1e-3))
        assert (leaf.grad.numpy() * direction).sum() == pytest.approx(slope, abs=1e-6, rel=1e-5)


@pytest.mark.parametrize("name", PUBLISHED)
def test_float32_and_bfloat16_stay_near_float64(name):
    torch.manual_seed(0)
    logits = torch.randn(3, 70, 16, dtype=torch.float64).bfloat16().double()
    exact = make_loss(name)(trace_of(logits, top_k=2))
    for dtype in (torch.float32, torch.bfloat16):
        leaf = logits.to(dtype).requires_grad_()
        loss = make_loss(name)(trace_of(leaf, logits.topk(2).indices))
        loss.backward()
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
        assert leaf.grad.dtype == dtype
        assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("name", PUBLISHED)
def test_extreme_logits_give_finite_gradients(name):
    logits = torch.tensor([[[300.0, -300.0, 0.0], [-300.0, 300.0, 0.0]] * 16], requires_grad=True)
    loss = make_loss(name)(trace_of(logits))
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("name", PUBLISHED)
def test_sigmoid_routers(name):
    torch.manual_seed(0)
    logits = torch.randn(2, 40, 6, dtype=torch.float64)
    p = logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
    ids = logits.topk(2).indices
    sigmoid = RoutingTrace([ids], 6, logits=[logits], score_functions=["sigmoid"])
    same = trace_of(p.log(), ids)
    assert make_loss(name)(sigmoid).item() == pytest.approx(make_loss(name)(same).item(), rel=1e-9)


# --- where the gradient points ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_step_down_pulls_a_lone_switch_back(name):
    """Two experts, the first on every token but the middle one: all pull the middle one towards the first."""
    logits = torch.zeros(1, 9, 2, dtype=torch.float64)
    logits[:, :, 0] = 1.0
    logits[:, 4] = torch.tensor([0.0, 1.0], dtype=torch.float64)
    leaf = logits.requires_grad_()
    make_loss(name)(trace_of(leaf)).backward()
    towards_first = -(leaf.grad[0, :, 0] - leaf.grad[0, :, 1])
    assert towards_first[4] > 0


@pytest.mark.parametrize("name", PUBLISHED)
def test_gradient_descent_removes_switching(name):
    torch.manual_seed(0)
    logits = torch.randn(2, 32, 4, dtype=torch.float64, requires_grad=True)
    loss, switches = make_loss(name), []
    for step in torch.linspace(0.1, 0, 60):
        trace = trace_of(logits)
        ids = trace.layers[0].expert_ids[..., 0]
        switches.append((ids[:, 1:] != ids[:, :-1]).float().mean().item())
        (gradient,) = torch.autograd.grad(loss(trace), logits)
        logits.data -= gradient / gradient.abs().mean() * step
    assert switches[0] > 0.6
    assert switches[-1] < 0.5 * switches[0]


# --- what must not matter -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("garbage", [1e4, float("nan"), float("inf")])
@pytest.mark.parametrize("name", PUBLISHED)
def test_padding_has_no_effect_and_no_gradient(name, garbage):
    torch.manual_seed(0)
    clean = torch.randn(2, 40, 5, dtype=torch.float64)
    valid = torch.ones(2, 40, dtype=torch.bool)
    valid[0, 30:] = valid[1, :7] = valid[1, 20] = False
    ids = clean.topk(2).indices
    dirty, dirty_ids = clean.clone(), ids.clone()
    dirty[~valid], dirty_ids[~valid] = garbage, -100
    a, b = clean.requires_grad_(), dirty.requires_grad_()
    loss = make_loss(name, **OPTIONS[name])
    one, other = loss(trace_of(a, ids, valid=valid)), loss(trace_of(b, dirty_ids, valid=valid))
    one.backward()
    other.backward()
    assert one.item() == other.item()
    assert torch.equal(a.grad, b.grad)
    assert not a.grad[~valid].any()
    assert a.grad[valid].any()


@pytest.mark.parametrize("name", PUBLISHED)
@settings(max_examples=50, deadline=None)
@given(case=cases())
def test_documents_never_mix(name, case):
    """Other logits in one document leave the gradient of all others as it was."""
    routing, logits = case
    found = documents(*routing.arrays)
    if len(found) < 2:
        return
    n, first, end = found[len(found) // 2]
    inside = torch.zeros_like(routing.valid)
    inside[n, first:end] = True
    outside = routing.valid & ~inside

    def outer_gradient(z):
        leaf = z.clone().requires_grad_()
        trace = trace_of(leaf, routing.expert_ids, **routing.masks)
        value = make_loss(name, **OPTIONS[name])(trace)
        if name == "remoe":  # the logarithm of the mean couples all tokens by a common factor: undo it
            log_term = ReMoELoss(smooth=0, lag=0, working_set=0)(trace)
            value = value - log_term + (-log_term).exp()
        value.backward()
        return leaf.grad[outside]

    before, after = outer_gradient(logits), outer_gradient(torch.where(inside[:, :, None], -3 * logits, logits))
    assert torch.allclose(before, after, atol=1e-9)


@pytest.mark.parametrize("name", PUBLISHED)
def test_packed_documents_equal_documents_in_rows_of_their_own(name):
    torch.manual_seed(0)
    packed = torch.randn(1, 60, 6, dtype=torch.float64)
    document_ids = torch.tensor([[4] * 25 + [9] * 35])
    rows, valid = torch.zeros(2, 35, 6, dtype=torch.float64), torch.zeros(2, 35, dtype=torch.bool)
    rows[0, 10:], valid[0, 10:] = packed[0, :25], True
    rows[1], valid[1] = packed[0, 25:], True
    loss = make_loss(name, **OPTIONS[name])
    one = loss(trace_of(packed, top_k=2, document_ids=document_ids))
    other = loss(trace_of(rows, top_k=2, valid=valid))
    assert one.item() == pytest.approx(other.item(), rel=1e-12)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("shape", [(2, 5), (0, 5), (2, 0)])
def test_an_empty_batch_gives_zero_with_a_graph(name, shape):
    logits = torch.randn(*shape, 4, requires_grad=True)
    ids = torch.zeros(*shape, 1, dtype=torch.int64)
    loss = make_loss(name)(trace_of(logits, ids, valid=torch.zeros(shape, dtype=torch.bool)))
    assert loss.item() == 0
    loss.backward()
    assert not logits.grad.any()


@pytest.mark.parametrize("name", ["remoe", "sticky", "adjacent"])
def test_documents_of_one_token_have_no_pairs(name):
    logits = torch.randn(2, 6, 4, requires_grad=True)
    loss = make_loss(name)(trace_of(logits, document_ids=torch.arange(6).expand(2, 6)))
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


def test_layers_are_averaged_not_pooled():
    torch.manual_seed(0)
    one, other = torch.randn(2, 20, 4), torch.randn(2, 20, 8)
    both = RoutingTrace([one.topk(1).indices, other.topk(2).indices], [4, 8], logits=[one, other])
    for name in PUBLISHED:
        loss = make_loss(name)
        singles = (loss(trace_of(one)) + loss(trace_of(other, top_k=2))) / 2
        assert loss(both).item() == pytest.approx(singles.item(), rel=1e-5)


# --- the registry and bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(LOCALITY_LOSSES))
def test_every_name_makes_a_loss_that_trains(name):
    torch.manual_seed(0)
    logits = torch.randn(2, 80, 8, requires_grad=True)
    loss = make_loss(name)
    assert isinstance(loss, RoutingLoss)
    assert type(loss) is LOCALITY_LOSSES[name]
    loss(trace_of(logits, top_k=2)).backward()
    assert logits.grad.any()


def test_an_unknown_name_or_option_says_what_is_known():
    with pytest.raises(ValueError, match=r"srp.*lru.*remoe.*sticky.*adjacent.*melinoe.*got 'remo'"):
        make_loss("remo")
    with pytest.raises(TypeError, match=r"'sticky'.*'window'.*got \['windw'\]"):
        make_loss("sticky", windw=3)
    with pytest.raises(TypeError, match=r"among \[\], got \['window'\]"):
        make_loss("adjacent", window=3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(ReMoELoss, smooth=-1.0), "smooth"),
        (partial(ReMoELoss, lag=float("nan")), "lag"),
        (partial(ReMoELoss, distances=()), "distances"),
        (partial(ReMoELoss, distances=(1, 1)), "distances"),
        (partial(ReMoELoss, distances=(0,)), "distances"),
        (partial(ReMoELoss, window=0), "window"),
        (partial(StickyLoss, anchor=float("inf")), "anchor"),
        (partial(StickyLoss, window=2.5), "window"),
        (partial(MelinoeLoss, decay=1.1), "decay"),
        (partial(MelinoeLoss, cache_share=0.0), "cache_share"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_trace_without_logits_is_refused(name):
    trace = RoutingTrace([torch.zeros(1, 4, 1, dtype=torch.int64)], 2)
    with pytest.raises(ValueError, match="logits"):
        make_loss(name)(trace)
