"""The least-squares refit: it loses nothing where nothing is missing, and is the best fit where something is."""

import pytest
import torch
from dense_models import llama, logits, qwen2, text, turned

from consistency_reg.lab.upcycle.convert import Plan, mlp_inputs
from consistency_reg.lab.upcycle.refit import chosen_neurons, refit


@pytest.mark.parametrize("dense", [llama(), qwen2()])
def test_where_all_experts_are_active_nothing_changes(dense):
    model = turned(dense, Plan(splits=4, top_k=4, shared=1 / 4, router_scale=0, layers=(1, 2)))
    refit(dense, model, list(text()))
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("plan", [{"shared": 1 / 2}, {"copies": 2}, {"router_scale": 2.0}])
def test_the_mixture_comes_nearer_to_the_dense_model(plan):
    dense, rows = llama(), list(text(16))
    model = turned(dense, Plan(splits=8, top_k=2, **plan))
    before = (logits(model) - logits(dense)).square().mean()
    left = refit(dense, model, rows)
    assert list(left) == [0, 1, 2]
    assert all(share < 1 for share in left.values())
    assert (logits(model) - logits(dense)).square().mean() < 0.8 * before


@torch.no_grad()
def test_it_is_the_least_squares_solution():
    dense, rows = llama(), list(text(16))
    plan = Plan(splits=8, top_k=3, shared=1 / 2, layers=(0,))
    model = turned(dense, plan)
    block = model.model.layers[0].mlp
    inputs = mlp_inputs(dense, rows, [0])[0]
    held = chosen_neurons(block, inputs)
    left = refit(dense, model, rows, ridge=1e-6)[0]
    wanted = dense.model.layers[0].mlp(inputs)
    best = torch.linalg.lstsq(held.double(), wanted.double()).solution
    torch.testing.assert_close(block(inputs[None])[0], (held.double() @ best).float(), rtol=1e-2, atol=1e-2)
    first = turned(dense, plan).model.layers[0].mlp(inputs[None])[0]
    error, error_before = ((made - wanted).square().sum() for made in (block(inputs[None])[0], first))
    assert left == pytest.approx(float(error / error_before), rel=0.02)


@torch.no_grad()
def test_the_chosen_neurons_times_the_projections_are_what_the_block_gives():
    dense = llama()
    block = turned(dense, Plan(splits=4, copies=2, top_k=3, shared=1 / 4)).model.layers[1].mlp
    inputs = torch.randn(50, 32)
    routed = block.experts.down_proj.transpose(1, 2).flatten(0, 1)
    projections = torch.cat([routed, block.shared_expert.down_proj.weight.T])
    torch.testing.assert_close(chosen_neurons(block, inputs) @ projections, block(inputs[None])[0])


def test_bfloat16_is_near():
    dense, rows = llama(), list(text(16))
    plain, fast = (turned(dense, Plan(splits=8, top_k=2)) for _ in range(2))
    refit(dense, plain, rows)
    refit(dense, fast, rows, autocast=torch.bfloat16)
    error, away = ((logits(one) - logits(other)).square().mean() for one, other in ((plain, dense), (plain, fast)))
    assert away < error


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rows": []}, "rows must hold at least one row"), ({"ridge": 0.0}, "ridge must be positive, got 0.0")],
)
def test_what_cannot_be_fitted_is_named(options, message):
    dense = llama()
    with pytest.raises(ValueError, match=message):
        refit(dense, turned(dense, Plan()), **{"rows": list(text()), **options})
