"""The router anchor: its value, that it judges the present input, and that nothing learns through the reference."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import anchor_oracle, softmax
from strategies import routings
from torch import nn

from consistency_reg.capture import RouterCapture
from consistency_reg.losses import RouterAnchorLoss
from consistency_reg.routing import RoutingTrace


class ToyTopKRouter(nn.Module):
    def __init__(self, hidden, experts):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, hidden))

    def forward(self, hidden):
        logits = hidden.reshape(-1, hidden.shape[-1]) @ self.weight.T
        weights, ids = logits.softmax(-1).topk(2)
        return logits, weights, ids


class Block(nn.Module):
    """A layer whose router sees the hidden state that the layer before it changed."""

    def __init__(self, hidden, experts):
        super().__init__()
        self.gate = ToyTopKRouter(hidden, experts)
        self.mix = nn.Linear(hidden, hidden)

    def forward(self, x):
        logits, _, _ = self.gate(x)
        return x + self.mix(x) * logits.softmax(-1).amax(-1).view(*x.shape[:2], 1)


def model_of(layers=2, hidden=6, experts=4):
    torch.manual_seed(0)
    return nn.Sequential(*[Block(hidden, experts) for _ in range(layers)])


def trace_on(capture, model, x, **masks):
    with capture:
        model(x)
    return capture.trace(**masks)


def test_value_by_hand():
    # p = (3/4, 1/4) against a reference of (1/2, 1/2)
    logits = torch.tensor([[[math.log(3.0), 0.0]]])
    trace = RoutingTrace([torch.tensor([[[0]]])], 2, logits=[logits], inputs=[torch.ones(1, 1, 3)])
    reference = nn.Linear(3, 2)
    nn.init.zeros_(reference.weight)
    nn.init.zeros_(reference.bias)
    loss = RouterAnchorLoss({"layer_00": reference})(trace)
    assert loss.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-6)


@settings(max_examples=80, deadline=None)
@given(routings(), st.integers(0, 2**32 - 1))
def test_value_and_gradient_equal_the_oracle(routing, seed):
    torch.manual_seed(seed)
    E, hidden = routing.num_experts, 3
    inputs = torch.randn(*routing.valid.shape, hidden, dtype=torch.float64)
    logits = torch.randn(*routing.valid.shape, E, dtype=torch.float64, requires_grad=True)
    reference = nn.Linear(hidden, E, dtype=torch.float64)
    trace = RoutingTrace([routing.expert_ids], E, logits=[logits], inputs=[inputs], **routing.masks)
    loss = RouterAnchorLoss({"layer_00": reference})(trace)
    p_ref = softmax(reference(inputs).detach().numpy())

    def oracle(z):
        return anchor_oracle(softmax(z), p_ref, routing.valid.numpy())

    z, step = logits.detach().numpy(), 1e-5
    assert loss.item() == pytest.approx(oracle(z), abs=1e-10)
    loss.backward()
    direction = torch.randn_like(logits).numpy()
    slope = (oracle(z + step * direction) - oracle(z - step * direction)) / (2 * step)
    assert (logits.grad.numpy() * direction).sum() == pytest.approx(slope, abs=1e-6, rel=1e-5)


def test_zero_at_the_start_and_pulled_back_after_a_change():
    model, x = model_of(), torch.randn(2, 5, 6)
    capture = RouterCapture(model, keep_inputs=True)
    anchor = RouterAnchorLoss(capture.frozen_routers())
    assert anchor(trace_on(capture, model, x)).item() == pytest.approx(0, abs=1e-7)

    weight = model[1].gate.weight
    weight.data += 0.5 * torch.randn_like(weight)
    losses = []
    for _ in range(60):
        loss = anchor(trace_on(capture, model, x))
        losses.append(loss.item())
        (gradient,) = torch.autograd.grad(loss, weight)
        weight.data -= gradient
    assert losses[0] > 1e-2
    assert losses[-1] < 0.1 * losses[0]


def test_the_reference_sees_the_present_input():
    """A change of the first layer changes the second's input, which the reference of the second follows."""
    model, x = model_of(), torch.randn(2, 5, 6)
    capture = RouterCapture(model, keep_inputs=True)
    anchor = RouterAnchorLoss(capture.frozen_routers())
    model[0].mix.weight.data += 1.0
    first, second = anchor.per_layer(trace_on(capture, model, x))
    assert first.item() == pytest.approx(0, abs=1e-7)
    assert second.item() == pytest.approx(0, abs=1e-7)


def test_nothing_learns_through_the_reference():
    model, x = model_of(), torch.randn(2, 5, 6)
    capture = RouterCapture(model, keep_inputs=True)
    anchor = RouterAnchorLoss(capture.frozen_routers())
    assert not any(parameter.requires_grad for parameter in anchor.parameters())
    frozen = {name: value.clone() for name, value in anchor.state_dict().items()}
    for block in model:
        block.gate.weight.data += 0.3 * torch.randn_like(block.gate.weight)
    anchor.train()
    trace = trace_on(capture, model, x)
    assert not any(layer.inputs.requires_grad for layer in trace)
    anchor(trace).backward()
    assert all(block.gate.weight.grad.any() for block in model)
    assert all(torch.equal(frozen[name], value) for name, value in anchor.state_dict().items())


def test_padding_has_no_effect_and_no_gradient():
    torch.manual_seed(0)
    valid = torch.tensor([[True, True, False], [False, True, True]])
    inputs, logits = torch.randn(2, 3, 4), torch.randn(2, 3, 5)
    dirty_inputs, dirty_logits = inputs.clone(), logits.clone()
    dirty_inputs[~valid], dirty_logits[~valid] = float("nan"), float("inf")
    anchor, values = RouterAnchorLoss({"layer_00": nn.Linear(4, 5)}), []
    ids = logits.topk(1).indices
    for given_inputs, given_logits in ((inputs, logits), (dirty_inputs, dirty_logits)):
        leaf = given_logits.requires_grad_()
        loss = anchor(RoutingTrace([ids], 5, logits=[leaf], inputs=[given_inputs], valid=valid))
        loss.backward()
        assert not leaf.grad[~valid].any()
        assert leaf.grad[valid].any()
        values.append(loss.item())
    assert values[0] == values[1]


def test_an_empty_batch_gives_zero_with_a_graph():
    logits = torch.randn(1, 3, 2, requires_grad=True)
    trace = RoutingTrace(
        [torch.zeros(1, 3, 1, dtype=torch.int64)],
        2,
        logits=[logits],
        inputs=[torch.randn(1, 3, 4)],
        valid=torch.zeros(1, 3, dtype=torch.bool),
    )
    loss = RouterAnchorLoss({"layer_00": nn.Linear(4, 2)})(trace)
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


def test_a_checkpoint_brings_the_first_routers_back():
    """A resumed run builds the anchor on fine-tuned routers; the state dict restores what it was anchored to."""
    model, x = model_of(), torch.randn(2, 5, 6)
    capture = RouterCapture(model, keep_inputs=True)
    anchor = RouterAnchorLoss(capture.frozen_routers())
    model[0].gate.weight.data += 1.0
    model[1].gate.weight.data *= 0.3
    resumed = RouterAnchorLoss(capture.frozen_routers())
    trace = trace_on(capture, model, x)
    assert resumed(trace).item() == pytest.approx(0, abs=1e-7)
    resumed.load_state_dict(anchor.state_dict())
    assert resumed(trace).item() == anchor(trace).item() > 1e-3


def test_copies_made_while_attached_do_not_record():
    model, x = model_of(), torch.randn(2, 5, 6)
    capture = RouterCapture(model, keep_inputs=True)
    with capture:
        anchor = RouterAnchorLoss(capture.frozen_routers())
        model(x)
        trace = capture.trace()
        anchor(trace)
        assert torch.equal(capture.trace().layers[0].logits, trace.layers[0].logits)


def test_a_transformers_model():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.OlmoeConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
    )
    model = transformers.OlmoeForCausalLM(config)
    capture = RouterCapture(model, keep_inputs=True)
    anchor = RouterAnchorLoss(capture.frozen_routers())
    with capture:
        model(torch.randint(32, (2, 7)))
    trace = capture.trace()
    assert trace.layers[0].inputs.shape == (2, 7, 16)
    assert anchor(trace).item() == pytest.approx(0, abs=1e-7)
    for router in capture.routers.values():
        router.weight.data += 0.5 * torch.randn_like(router.weight)
    with capture:
        model(torch.randint(32, (2, 7)))
    anchor(capture.trace()).backward()
    assert all(router.weight.grad.any() for router in capture.routers.values())


def test_bad_input():
    model, x = model_of(), torch.randn(2, 5, 6)
    with pytest.raises(ValueError, match="references must hold"):
        RouterAnchorLoss({})
    plain = RouterCapture(model)
    with pytest.raises(ValueError, match="keep_inputs=True"):
        RouterAnchorLoss(plain.frozen_routers())(trace_on(plain, model, x))
    keeping = RouterCapture(model, keep_inputs=True)
    with pytest.raises(ValueError, match=r"'0\.gate'.*\['other'\]"):
        RouterAnchorLoss({"other": nn.Linear(6, 4)})(trace_on(keeping, model, x))
    with pytest.raises(ValueError, match=r"inputs of layer.*\[B, T, H\]"):
        RoutingTrace([torch.zeros(1, 3, 1, dtype=torch.int64)], 2, inputs=[torch.zeros(3, 4)])


def test_a_router_called_by_keyword_is_refused():
    class KeywordBlock(Block):
        def forward(self, x):
            self.gate(hidden=x)
            return x

    model, x = nn.Sequential(KeywordBlock(6, 4)), torch.randn(2, 5, 6)
    capture = RouterCapture(model, keep_inputs=True)
    with capture:
        model(x)
    with pytest.raises(RuntimeError, match="first positional argument"):
        capture.trace()
