"""What saves memory and time changes neither the routing that is captured nor the gradient of the term."""

import pytest
import torch
from tiny_models import tiny_model, token_ids

from consistency_reg import LocalConsistencyLoss, RouterCapture
from consistency_reg.integrations import attach

B, T = 3, 12
LOSS = LocalConsistencyLoss((3, 5))


def one_step(prepare=lambda model: model, kind="olmoe", autocast=None):
    """(term, ids of every layer, gradients by name) of one training forward and backward."""
    model, ids = tiny_model(kind).train(), token_ids(B, T)
    term = attach(model, LOSS, weight=20.0)
    called, seen = prepare(model), []
    loss_of = term.loss.per_layer
    term.loss = LocalConsistencyLoss((3, 5))
    term.loss.per_layer = lambda trace: seen.append([layer.expert_ids for layer in trace]) or loss_of(trace)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        loss = called(ids, labels=ids).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert len(seen) == 1  # layers that run again in the backward pass are no forward
    return term.value, seen[0], gradients


def assert_same(first, second, **tolerance):
    assert first[0] == pytest.approx(second[0], abs=1e-6)
    assert all(torch.equal(one, other) for one, other in zip(first[1], second[1], strict=True))
    assert first[2].keys() == second[2].keys()
    for name, gradient in first[2].items():
        torch.testing.assert_close(gradient, second[2][name], **tolerance)


def checkpointed(use_reentrant):
    def prepare(model):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        return model

    return prepare


@pytest.mark.parametrize("kind", ["olmoe", "deepseek_v3"])
def test_checkpointing_gives_the_same_gradients(kind):
    assert_same(one_step(kind=kind), one_step(checkpointed(False), kind), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:a loss on this trace has no gradient")
def test_reentrant_checkpointing_is_refused():
    with pytest.raises(RuntimeError, match=r"no gradient.*use_reentrant=False"):
        one_step(checkpointed(True))


@pytest.mark.parametrize("experts", ["batched_mm", "grouped_mm"])
def test_experts_implementations_give_the_same(experts):
    def of(name):
        def prepare(model):
            model.set_experts_implementation(name)
            return model

        return prepare

    assert_same(one_step(of("eager")), one_step(of(experts)), rtol=1e-4, atol=1e-5)


def test_attention_implementations_give_the_same():
    def of(name):
        def prepare(model):
            model.set_attn_implementation(name)
            return model

        return prepare

    assert_same(one_step(of("eager")), one_step(of("sdpa")), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_captures_what_runs_and_has_finite_gradients(dtype):
    value, ids, gradients = one_step(autocast=dtype)
    again, _, _ = one_step(autocast=dtype)
    assert 0 < value < 1
    assert value == again
    assert value == pytest.approx(one_step()[0], abs=0.05)
    assert all(layer.shape == (B, T, 2) for layer in ids)
    routers = [gradient for name, gradient in gradients.items() if ".gate." in name]
    assert len(routers) == 2
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in gradients.values())
    assert all(gradient.abs().max() > 0 for gradient in routers)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_model_gives_the_same(backend):
    torch._dynamo.reset()
    try:
        compiled = one_step(lambda model: torch.compile(model, backend=backend), "mixtral")
        assert_same(one_step(kind="mixtral"), compiled, rtol=1e-4, atol=1e-5)
    finally:
        torch._dynamo.reset()


@pytest.mark.parametrize("listen", ["capture", "attach"])
def test_a_compiled_model_stays_one_graph(listen):
    """The routers are heard inside of it, and the term comes after it."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    try:
        model, ids = tiny_model("mixtral").train(), token_ids(B, T)
        if listen == "attach":
            term = attach(model, LOSS, weight=20.0)
            torch.compile(model, backend=backend)(ids, labels=ids)
            assert 0 < term.value < 1
        else:
            with RouterCapture(model) as capture:
                torch.compile(model, backend=backend)(ids, labels=ids)
            assert len(capture.trace().layers) == 2
        assert len(graphs) == 1
    finally:
        torch._dynamo.reset()
