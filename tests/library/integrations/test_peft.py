"""LoRA on attention, the router trained with it: captured through PEFT's wrappers, changed, saved and loaded again."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import tiny_model, token_ids

from consistency_reg import LocalConsistencyLoss, RouterCapture
from consistency_reg.integrations import attach

B, T = 4, 12
LOSS = LocalConsistencyLoss((3, 5), scope="sequence")
WAYS = {
    "modules_to_save": {"modules_to_save": ["gate"]},  # the router in full
    "target_parameters": {"target_parameters": ["mlp.gate.weight"]},  # LoRA on the router
}


def lora(kind="olmoe", **options):
    """The tiny model with LoRA on attention."""
    torch.manual_seed(0)
    return get_peft_model(tiny_model(kind), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **options)).train()


def train(model, ids, steps=3, weight=20.0):
    with attach(model, LOSS, weight):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        for _ in range(steps):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def routing(model, ids):
    with RouterCapture(model.eval()) as capture, torch.no_grad():
        model(input_ids=ids)
    return capture.trace()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["olmoe", "qwen3_moe"])
def test_routers_are_captured_through_the_wrappers(kind, way):
    ids = token_ids(B, T)
    plain, wrapped = routing(tiny_model(kind), ids), routing(lora(kind, **WAYS[way]), ids)
    assert len(wrapped) == len(plain) == 2
    assert wrapped.shape == (B, T)
    for one, other in zip(plain, wrapped, strict=True):
        assert torch.equal(one.expert_ids, other.expert_ids)
        assert one.name in other.name


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("error::UserWarning")  # these routers learn
def test_router_weights_change_and_are_saved_and_loaded(way, tmp_path):
    ids = token_ids(B, T)
    model = lora(**WAYS[way])
    before = routing(model, ids)
    train(model.train(), ids)
    after = routing(model, ids)
    assert LOSS(after) < LOSS(before)
    for one, other in zip(before, after, strict=True):
        assert not torch.allclose(one.logits, other.logits, atol=1e-3)
    model.save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(tiny_model("olmoe"), tmp_path)
    for one, other in zip(after, routing(loaded, ids), strict=True):
        torch.testing.assert_close(one.logits, other.logits)
    torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    merged = loaded.merge_and_unload()  # a plain model again
    assert type(merged).__name__ == "OlmoeForCausalLM"
    torch.testing.assert_close(merged(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


def test_a_router_in_modules_to_save_is_trained_in_full_and_nothing_else_of_the_model():
    ids = token_ids(B, T)
    model = lora(modules_to_save=["gate"])
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train(model, ids)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, start[name])}
    assert {name for name in changed if ".gate." in name} == {
        f"base_model.model.model.layers.{layer}.mlp.gate.modules_to_save.default.weight" for layer in (0, 1)
    }
    assert all("lora_" in name for name in changed if ".gate." not in name)


def test_with_the_adapter_off_the_routers_of_before_are_captured():
    ids = token_ids(B, T)
    model = lora(modules_to_save=["gate"])
    before = routing(model, ids)
    train(model.train(), ids)
    with model.disable_adapter():
        torch.testing.assert_close(routing(model, ids).layers[0].logits, before.layers[0].logits)
    assert not torch.allclose(routing(model, ids).layers[0].logits, before.layers[0].logits, atol=1e-3)


def test_lora_without_the_router_is_warned_of():
    model, ids = lora(), token_ids(B, T)
    with pytest.warns(UserWarning, match=r"all 2 routers are frozen.*modules_to_save or target_parameters"):
        attach(model, LOSS, 20.0)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)  # it moves what feeds them


def test_attaching_before_peft_wraps_the_routers_is_an_error():
    """The wrapper calls a copy of the router, which the capture does not hear."""
    model, ids = tiny_model("olmoe"), token_ids(B, T)
    attach(model, LOSS)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["gate"])).train()
    with pytest.raises(RuntimeError, match=r"0 of 2 routers were captured.*PEFT has wrapped since"):
        wrapped(input_ids=ids, labels=ids)
