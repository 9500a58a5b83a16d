"""The capture on architectures of transformers: one of each way to route in every run, all in the slow tests."""

import re

import pytest
import torch
import transformers
from architectures import DOCUMENT, check, check_routing, document, draw_routers, examine, walk
from tiny_architectures import E, K, build

from consistency_reg import LocalConsistencyLoss, RouterAnchorLoss, RouterCapture, RoutingTrace
from consistency_reg.capture import DEFAULT_ADAPTERS

# One model type for each way to route: the adapter that reads it, and what it selects by.
REPRESENTATIVES = (
    *("olmoe", "gpt_oss", "deepseek_v3", "deepseek_v2", "deepseek_v4", "mistral4", "axk2", "ernie4_5_moe", "flint"),
    *("longcat_flash", "kolibri1", "afmoe", "minimax_m2", "hunyuan_v1_moe", "dbrx", "jetmoe", "llama4_text"),
    *("gemma4_text", "zaya", "doge", "switch_transformers", "nllb-moe", "granitemoehybrid", "phimoe", "lfm2_moe"),
    *("openai_privacy_filter", "cohere2_moe", "jamba", "inkling_text", "laguna", "beam", "hy_v3"),
)
COMMITTED = DOCUMENT.read_text(encoding="utf-8")


@pytest.mark.parametrize("model_type", REPRESENTATIVES)
def test_each_way_to_route_is_captured(model_type):
    model, inputs, _ = build(model_type)
    check(model, inputs)


@pytest.mark.parametrize("model_type", REPRESENTATIVES)
def test_each_way_to_route_can_know_the_cache_or_says_why_not(model_type):
    """The weights of another choice are those that the router's own code gives it."""
    model, inputs, _ = build(model_type)
    said = check_routing(model, inputs)
    refused = {"doge", "nllb-moe", "phimoe"}
    assert said.startswith("no: " if model_type in refused else "yes")


def test_every_adapter_has_a_representative():
    """A way to route without one would be seen by the slow walk alone."""
    kinds = {
        type(router).__name__ for name in REPRESENTATIVES for router in RouterCapture(build(name)[0]).routers.values()
    }
    for adapter in DEFAULT_ADAPTERS:
        assert any(re.search(adapter.pattern, kind) for kind in kinds), adapter.pattern


@pytest.mark.parametrize("model_type", ["qwen3_vl_moe", "ernie4_5_vl_moe", "diffusion_gemma"])
def test_multimodal_models_are_captured_on_text(model_type):
    model, inputs, kind = build(model_type)
    assert kind == "multimodal"
    check(model, inputs)


@pytest.mark.parametrize("model_type", ["olmoe", "deepseek_v3", "gpt_oss", "minimax_m2"])
def test_every_implementation_of_the_experts_gives_the_same_ids(model_type):
    model, inputs, _ = build(model_type)
    capture = RouterCapture(model).attach()
    draw_routers(capture)
    traces = {}
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        model.set_experts_implementation(implementation)
        assert model.config._experts_implementation == implementation
        model(**inputs)
        traces[implementation] = capture.trace()
    for name in ("batched_mm", "grouped_mm"):
        for layer, expected in zip(traces[name], traces["eager"], strict=True):
            assert torch.equal(layer.expert_ids, expected.expert_ids)
            torch.testing.assert_close(layer.scores, expected.scores, rtol=1e-4, atol=1e-5)


def test_routing_by_a_table_has_no_gradient():
    """The term can move the layers that select by scores alone; the others count in its value."""
    model, inputs, _ = build("deepseek_v4")
    with RouterCapture(model) as capture:
        draw_routers(capture)
        model(**inputs)
    by_table = [layer for layer in capture.trace() if hasattr(capture.routers[layer.name], "tid2eid")]
    assert len(by_table) == 2
    for layer in by_table:
        assert not layer.scores.requires_grad
        assert torch.equal(layer.scores.sum(dim=-1), torch.full(layer.scores.shape[:2], float(K)))
    tokens, routed = inputs["input_ids"].flatten(), by_table[0].expert_ids.flatten(0, 1)
    assert torch.equal(routed, capture.routers[by_table[0].name].tid2eid[tokens])
    value = LocalConsistencyLoss((4,)).per_layer(capture.trace())
    assert (value[:2] > 0).all()


def test_the_square_root_of_softplus_is_a_distribution():
    """DeepSeek-V4's weights, finite in their logarithm however low a logit."""
    logits = torch.tensor([[[0.3, -2.0, 1.5, -300.0]]])
    (layer,) = RoutingTrace([logits.topk(1).indices], 4, logits=[logits], score_functions=["sqrtsoftplus"])
    weights = (1 + logits.double().exp()).log().sqrt()
    torch.testing.assert_close(layer.probabilities.double(), weights / weights.sum(), rtol=1e-5, atol=1e-7)
    assert layer.log_probabilities.isfinite().all()
    expected = (weights / weights.sum()).log()[..., :3]
    torch.testing.assert_close(layer.log_probabilities.double()[..., :3], expected, rtol=1e-5, atol=1e-6)


def test_a_choice_beyond_the_experts_is_a_class_of_its_own():
    """Zaya may skip the experts: that must not count as a use of expert 0, which it is handed on as."""
    model, inputs, _ = build("zaya")
    with RouterCapture(model) as capture:
        draw_routers(capture)
        with torch.no_grad():
            for router in capture.routers.values():
                router.balancing_biases[-1] = 0.1
        model(**inputs)
    layer = capture.trace().layers[0]
    assert layer.num_experts == E + 1
    assert (layer.expert_ids == E).any()


@pytest.mark.parametrize(
    "model_type", ["minimax_m2", "afmoe", "gemma4_text", "llama4_text", "deepseek_v4", "dbrx", "nllb-moe"]
)
def test_a_router_can_be_anchored_to_what_it_was(model_type):
    """Whatever its forward takes and returns, the frozen copy gives its logits on its own input: no divergence yet."""
    model, inputs, _ = build(model_type)
    capture = RouterCapture(model, keep_inputs=True)
    draw_routers(capture)
    anchor = RouterAnchorLoss(capture.frozen_routers())
    with capture:
        model(**inputs)
    torch.testing.assert_close(anchor(capture.trace()).item(), 0.0, atol=1e-5, rtol=0)
    with torch.no_grad():
        for router in capture.routers.values():
            weight = next(p for p in router.parameters() if p.dim() == 2)
            weight.add_(torch.randn_like(weight))
    with capture:
        model(**inputs)
    assert anchor(capture.trace()) >= 0


def test_a_router_of_more_than_its_input_cannot_be_anchored():
    model, inputs, _ = build("zaya")
    capture = RouterCapture(model, keep_inputs=True)
    anchor = RouterAnchorLoss(capture.frozen_routers())
    with capture:
        model(**inputs)
    with pytest.raises(ValueError, match="ZayaRouter routes by more than its own input"):
        anchor(capture.trace())


def test_what_cannot_be_captured_says_why():
    assert "not routed" in examine("vitpose").reason
    assert not examine("vitpose").passes


def test_the_table_is_of_the_installed_version_and_all_causal_models_pass():
    if f"transformers {transformers.__version__}." not in COMMITTED:
        pytest.skip(f"the table is of another version than {transformers.__version__}")
    result = dict(
        re.findall(r"^\|[^|]*\| `([^`]+)` \| causal \|[^|]*\| ([^|]*) \|[^|]*\|$", COMMITTED, flags=re.MULTILINE)
    )
    assert set(REPRESENTATIVES) - {"switch_transformers", "nllb-moe", "openai_privacy_filter"} <= set(result)
    assert set(result.values()) == {"pass"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_committed_table_is_what_the_installed_version_gives():
    assert document(walk()) == COMMITTED
