"""A dense model as a mixture of experts: the same logits where all experts are active, and a stock architecture."""

import pytest
import torch
from dense_models import llama, logits, qwen2, text, turned
from transformers import AutoModelForCausalLM

from consistency_reg import RouterCapture
from consistency_reg.lab.upcycle.convert import Plan, mlp_inputs, upcycle


@pytest.mark.parametrize("dense", [llama(), llama(tie_word_embeddings=True, head_dim=16), qwen2()])
@pytest.mark.parametrize(
    "plan",
    [
        Plan(splits=8, top_k=8, router_scale=0),
        Plan(splits=4, copies=2, top_k=8, router_scale=0),
        Plan(splits=4, top_k=4, shared=1 / 4, router_scale=0),
        Plan(splits=8, top_k=8, layers=(1,), router_scale=0),
        Plan(splits=1, copies=4, top_k=2, router_scale=3.0),
    ],
    ids=["split", "copy and split", "shared", "one layer", "copy"],
)
def test_the_logits_are_the_dense_models_where_the_method_allows_it(dense, plan):
    torch.testing.assert_close(logits(turned(dense, plan)), logits(dense), rtol=1e-4, atol=1e-4)


def test_it_is_a_stock_model_that_plain_transformers_loads(tmp_path):
    plan = Plan(splits=4, copies=2, top_k=2, shared=1 / 4, layers=(0, 2))
    model = turned(llama(), plan)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(logits(loaded), logits(model))
    with RouterCapture(loaded) as capture:
        loaded(text())
    trace = capture.trace()
    assert [(layer.num_experts, layer.top_k) for layer in trace] == [(8, 2), (8, 2)]


def test_without_a_shared_expert_it_loads_too(tmp_path):
    model = turned(llama(), Plan(splits=4, top_k=2))
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_every_neuron_is_in_one_expert_of_each_copy_or_shared():
    dense, plan = llama(), Plan(splits=4, copies=2, top_k=2, shared=1 / 4)
    block = turned(dense, plan).model.layers[1].mlp
    wanted = sorted(map(tuple, dense.model.layers[1].mlp.up_proj.weight.tolist()))
    shared = [tuple(row) for row in block.shared_expert.up_proj.weight.tolist()]
    up = block.experts.gate_up_proj.chunk(2, dim=1)[1]
    for copy in up.split(4):
        assert sorted(shared + [tuple(row) for row in copy.flatten(0, 1).tolist()]) == wanted
    assert not torch.equal(*up.split(4))  # the copies are split otherwise


@torch.no_grad()
def test_its_router_chooses_experts_that_write_more_than_random_ones_do():
    dense = llama()
    plan = Plan(splits=8, top_k=2, router_scale=0.5)
    model = turned(dense, plan)
    inputs = mlp_inputs(dense, list(text()), [1])[1]
    block = model.model.layers[1].mlp
    one_each = torch.eye(8)
    written = torch.stack(
        [
            block.experts(inputs, torch.full((len(inputs), 1), e), one_each[e, e].expand(len(inputs), 1))
            for e in range(8)
        ]
    ).norm(dim=-1)
    chosen = block.gate(inputs)[2]
    share = written.T.gather(1, chosen).sum() / written.sum()
    assert share > 1.1 * 2 / 8
    assert block.gate(inputs)[0].std() == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize(
    ("dense", "plan", "message"),
    [
        (llama(), {"splits": 5}, "splits must divide the 64 routed neurons"),
        (llama(), {"layers": (3,)}, r"layers must be some of 0..2, got \[3\]"),
        (llama(attention_bias=True), {}, "no bias in its output projections"),
    ],
)
def test_what_cannot_be_turned_is_named(dense, plan, message):
    with pytest.raises(ValueError, match=message):
        upcycle(dense, Plan(**plan), {index: torch.randn(9, 32) for index in range(4)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 9}, r"top_k must be at most splits \* copies = 8, got 9"),
        ({"splits": 0}, "splits must be at least 1, got 0"),
        ({"shared": 1.0}, r"shared must be a share in \[0, 1\), got 1.0"),
        ({"router_scale": -1.0}, "router_scale must be at least 0, got -1.0"),
    ],
)
def test_impossible_plans_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Plan(**options)
