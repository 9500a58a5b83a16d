"""RouterCapture on real transformers models: the router's own choice, once a forward, whatever a model goes through."""

import copy
import io
import pickle

import pytest
import torch
import transformers
from tiny_architectures import build
from tiny_models import COMMON, KINDS, E, K, tiny_model, token_ids
from torch import nn

from consistency_reg import LocalConsistencyLoss, RouterAdapter, RouterCapture

B, T = 3, 17
LOSS = LocalConsistencyLoss((4,))


def blocks_of(capture):
    """The MoE block around each router."""
    return {name: capture.model.get_submodule(name.rpartition(".")[0]) for name in capture.layer_names}


def router_gradients(model, capture, loss):
    model.zero_grad()
    loss.backward()
    return [router.weight.grad.clone() for router in capture.routers.values()]


def assert_same_routing(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.expert_ids, b.expert_ids)
        torch.testing.assert_close(a.scores, b.scores)


# --- what is captured ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_that_the_experts_receive(kind):
    model = tiny_model(kind)
    received = []
    with RouterCapture(model) as capture:
        hooks = [
            block.experts.register_forward_pre_hook(lambda _, inputs: received.append(inputs[1]))
            for block in blocks_of(capture).values()
        ]
        model(token_ids(B, T))
    for hook in hooks:
        hook.remove()
    trace = capture.trace()
    assert trace.shape == (B, T)
    assert len(trace) == len(received) == (1 if kind == "deepseek_v3" else 2)  # its first layer is dense
    for layer, expert_ids in zip(trace, received, strict=True):
        assert (layer.num_experts, layer.top_k) == (E, K)
        assert torch.equal(layer.expert_ids, expert_ids.view(B, T, K))
    trace.check_values()


@pytest.mark.parametrize("kind", KINDS)
def test_the_top_of_the_scores_are_the_ids(kind):
    """Also for DeepSeek-V3, which selects by biased sigmoids within its best groups."""
    model = tiny_model(kind)
    with RouterCapture(model) as capture:
        model(token_ids(B, T))
    for layer in capture.trace():
        best = layer.scores.topk(K).indices
        assert torch.equal(best.sort().values, layer.expert_ids.sort().values)
        assert layer.logits.shape == layer.scores.shape == (B, T, E)
        assert layer.score_function == ("sigmoid" if kind == "deepseek_v3" else "softmax")
    if kind == "deepseek_v3":
        by_logits = layer.logits.topk(K).indices
        assert not torch.equal(by_logits.sort().values, layer.expert_ids.sort().values)  # the test would see a shortcut


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_reaches_every_router(kind):
    model = tiny_model(kind)
    with RouterCapture(model) as capture:
        model(token_ids(B, T))
    gradients = router_gradients(model, capture, LOSS(capture.trace()))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert all(gradient.abs().max() > 0 for gradient in gradients)


def test_masks_pass_through():
    model = tiny_model("olmoe")
    valid = torch.ones(B, T, dtype=torch.bool)
    valid[1, 9:] = False
    document_ids = torch.arange(T).expand(B, T) // 5
    with RouterCapture(model) as capture:
        model(token_ids(B, T), attention_mask=valid.long())
    trace = capture.trace(valid=valid, document_ids=document_ids)
    assert trace.valid is valid
    assert trace.document_ids is document_ids
    assert trace.positions[1].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3] + [-1] * 8


def test_masks_of_another_shape_are_refused():
    """A transposed mask covers as many tokens: taken at its word it would pair tokens across rows."""
    model = tiny_model("olmoe")
    with RouterCapture(model) as capture:
        model(token_ids(B, T))
    with pytest.raises(ValueError, match=r"valid must have shape \[B, T\] = \[3, 17\], got \[17, 3\]"):
        capture.trace(valid=torch.ones(T, B, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"document_ids must have shape \[B, T\] = \[3, 17\], got \[3, 16\]"):
        capture.trace(document_ids=torch.zeros(B, T - 1, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"valid must be a bool tensor.*got torch.int64"):
        capture.trace(valid=torch.ones(B, T, dtype=torch.int64))


def test_each_forward_replaces_the_one_before():
    model = tiny_model("olmoe")
    with RouterCapture(model) as capture:
        model(token_ids(B, T))
        model(token_ids(2, 5, seed=1))
        assert capture.trace().shape == (2, 5)
        assert_same_routing(capture.trace(), capture.trace())
        capture.clear()
        with pytest.raises(RuntimeError, match="0 of 2 routers were captured: run a forward"):
            capture.trace()


# --- attaching ----------------------------------------------------------------------------------------------------


def test_attaching_twice_counts_once():
    model = tiny_model("olmoe")
    capture = RouterCapture(model).attach().attach()
    with capture:
        model(token_ids(B, T))
        assert len(capture.trace()) == 2


def test_detaching_leaves_the_model_as_it_was():
    model = tiny_model("olmoe")
    capture = RouterCapture(model)
    before = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    capture.attach()
    assert before != [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    model(token_ids(B, T))
    capture.detach()
    capture.detach()
    assert before == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    model(token_ids(B, T))
    with pytest.raises(RuntimeError, match="0 of 2 routers were captured: attach the capture before the forward"):
        capture.trace()
    capture.attach()
    model(token_ids(B, T))
    assert capture.trace().shape == (B, T)


def test_a_context_keeps_its_last_forward_and_hears_no_other():
    model = tiny_model("olmoe")
    with RouterCapture(model) as capture:
        model(token_ids(B, T))
    model(token_ids(2, 5))
    assert capture.trace().shape == (B, T)


def test_two_captures_at_once_do_not_disturb_each_other():
    model = tiny_model("olmoe")
    with RouterCapture(model) as outer:
        model(token_ids(B, T))
        with RouterCapture(model.model) as inner:
            model(token_ids(2, 5))
            assert_same_routing(outer.trace(), inner.trace())
        model(token_ids(1, 4))
        assert outer.trace().shape == (1, 4)
        assert inner.trace().shape == (2, 5)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: torch.load(_saved(model), weights_only=False),
}


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_of_an_attached_model_is_not_captured(way):
    model = tiny_model("olmoe")
    capture = RouterCapture(model).attach()
    expected = model(token_ids(B, T)).logits
    double = COPIES[way](model)
    torch.testing.assert_close(double(token_ids(B, T)).logits, expected)
    double(token_ids(2, 5))
    assert capture.trace().shape == (B, T)
    with RouterCapture(double) as of_double:
        double(token_ids(2, 5))
    assert of_double.trace().shape == (2, 5)
    assert capture.trace().shape == (B, T)
    model(token_ids(1, 4))
    assert capture.trace().shape == (1, 4)


# --- when forwards are not simple ---------------------------------------------------------------------------------


def test_recording_takes_all_inside_for_one_forward():
    """For a caller that runs a part of the model, as a trainer's step may."""
    model = tiny_model("olmoe")
    capture = RouterCapture(model).attach()
    with capture.recording():
        model.model(token_ids(B, T))
    trace = capture.trace()
    with capture.recording():
        model(token_ids(B, T))
    assert_same_routing(capture.trace(), trace)
    with capture.recording():
        model(token_ids(B, T))
        model(token_ids(B, T))
    with pytest.raises(RuntimeError, match=r"more than once in one forward.*model\.layers\.0\.mlp\.gate"):
        capture.trace()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_forward_that_fails_does_not_spoil_the_next(error):
    model = tiny_model("olmoe")
    capture = RouterCapture(model).attach()

    def fail(*_):
        raise error("stop")

    hook = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(error):
        model(token_ids(B, T))
    hook.remove()
    model(token_ids(2, 5))
    assert capture.trace().shape == (2, 5)


def test_detaching_within_a_recording_does_not_spoil_the_next():
    model = tiny_model("olmoe")
    capture = RouterCapture(model).attach()
    with capture.recording():
        capture.detach()
    capture.attach()
    model(token_ids(2, 5))
    assert capture.trace().shape == (2, 5)


def test_evaluation_and_generation_do_not_pollute_a_later_trace():
    model = tiny_model("olmoe")
    with RouterCapture(model) as alone:
        model(token_ids(B, T))
    capture = RouterCapture(model).attach()
    model.eval()
    with torch.no_grad():
        model(token_ids(2, 9))
    assert not capture.trace().layers[0].scores.requires_grad
    before = capture.trace()
    model.generate(token_ids(1, 4), max_new_tokens=3, do_sample=False)
    assert_same_routing(capture.trace(), before)
    model.train()
    model(token_ids(B, T))
    assert_same_routing(capture.trace(), alone.trace())
    assert capture.trace().layers[0].scores.requires_grad


def test_generation_is_recorded_when_asked_for():
    model = tiny_model("olmoe").eval()
    with RouterCapture(model, generation=True) as capture:
        model.generate(token_ids(1, 4), max_new_tokens=3, do_sample=False)
    assert capture.trace().shape == (1, 1)  # the last step, over the cache


def test_generation_within_a_recording_is_left_out():
    """As in a validation step that computes a loss and then prints a sample."""
    model = tiny_model("olmoe").eval()
    outer = nn.Sequential(model)
    with RouterCapture(outer) as capture, torch.no_grad(), capture.recording():
        model(token_ids(B, T))
        model.generate(token_ids(1, 4), max_new_tokens=3, do_sample=False)
    assert capture.trace().shape == (B, T)


def test_a_generation_that_fails_does_not_spoil_the_next_forward():
    model = tiny_model("olmoe").eval()
    capture = RouterCapture(model).attach()
    hook = model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.generate(token_ids(1, 4), max_new_tokens=3)
    hook.remove()
    model(token_ids(2, 5))
    assert capture.trace().shape == (2, 5)


# --- some of the routers -------------------------------------------------------------------------------------------


def test_an_encoder_and_a_decoder_of_different_lengths_are_captured_each():
    model, source, target = build("switch_transformers")[0], token_ids(2, 9), token_ids(2, 18)
    both = RouterCapture(model).attach()
    encoder, decoder = (RouterCapture(model, layers=f"^{stack}").attach() for stack in ("encoder", "decoder"))
    model(source, decoder_input_ids=target)
    with pytest.raises(ValueError, match=r"different shapes.*\(2, 9\): \['encoder.*\(2, 18\): \['decoder.*layers="):
        both.trace()
    assert encoder.trace().shape == (2, 9)
    assert decoder.trace().shape == (2, 18)
    model(source, decoder_input_ids=source)
    assert both.trace().layer_names == (*encoder.layer_names, *decoder.layer_names)


def test_layers_that_name_no_router_are_refused():
    with pytest.raises(ValueError, match=r"layers must match.*at least one router, got 'decoder'.*model\.layers\.0"):
        RouterCapture(tiny_model("olmoe"), layers="decoder")


def test_routers_that_need_not_run_can_be_left_out():
    model = tiny_model("olmoe")
    model.model.layers[0].mlp.forward = lambda hidden: hidden  # as a vision tower without pictures
    whole, part = RouterCapture(model).attach(), RouterCapture(model, layers=r"layers\.1").attach()
    model(token_ids(B, T))
    with pytest.raises(RuntimeError, match=r"1 of 2 routers.*leave them out with RouterCapture\(model, layers="):
        whole.trace()
    assert part.trace().layer_names == ("model.layers.1.mlp.gate",)


# --- activation checkpointing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["olmoe", "deepseek_v3"])
def test_checkpointing_counts_once_and_keeps_the_gradient(kind):
    gradients, traces = [], []
    for checkpointing in (False, True):
        model = tiny_model(kind).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        capture = RouterCapture(model).attach()
        ids = token_ids(B, T)
        loss = model(ids, labels=ids).loss + 10 * LOSS(capture.trace())
        gradients.append(router_gradients(model, capture, loss))
        traces.append(capture.trace())  # the layers ran again in the backward pass, which is no forward
    assert_same_routing(*traces)
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_reentrant_checkpointing_is_told_to_have_no_gradient():
    model = tiny_model("olmoe").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    capture = RouterCapture(model).attach()
    model(token_ids(B, T))
    with pytest.warns(UserWarning, match=r"no gradient for 2 of 2 routers.*use_reentrant=False"):
        trace = capture.trace()
    assert not LOSS(trace).requires_grad


@pytest.mark.filterwarnings("error")
def test_no_warning_where_no_gradient_is_asked_for():
    model = tiny_model("olmoe")
    with RouterCapture(model) as capture:
        model(token_ids(B, T))
        capture.trace()
        with torch.no_grad():
            model(token_ids(B, T))
        capture.trace()


# --- torch.compile ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    "backend", ["eager", *(pytest.param(name, marks=pytest.mark.slow) for name in ("aot_eager", "inductor"))]
)
def test_a_compiled_model_is_captured_as_it_is(backend):
    model, ids = tiny_model("mixtral"), token_ids(B, T)
    capture = RouterCapture(model).attach()
    model(ids)
    eager = capture.trace()
    expected = router_gradients(model, capture, LOSS(eager))
    compiled = torch.compile(model, backend=backend)
    for _ in range(2):
        compiled(ids)
        assert_same_routing(capture.trace(), eager)
        gradients = router_gradients(model, capture, LOSS(capture.trace()))
        for plain, gradient in zip(expected, gradients, strict=True):
            torch.testing.assert_close(gradient, plain, rtol=1e-4, atol=1e-6)
    capture.detach()
    compiled(ids)
    with pytest.raises(RuntimeError, match="0 of 2"):
        capture.trace()


@pytest.mark.usefixtures("compiler")
def test_a_capture_that_comes_after_compilation_says_so():
    model = nn.Sequential(ToyTopKRouter())
    compiled = torch.compile(model, backend="eager")
    compiled(torch.randn(B, T, 6))
    capture = RouterCapture(model).attach()
    compiled(torch.randn(B, T, 6))
    with pytest.raises(RuntimeError, match=r"0 of 1 routers.*torch\.compile has compiled before the capture"):
        capture.trace()


# --- models that cannot be captured -------------------------------------------------------------------------------


class ToyTopKRouter(nn.Linear):
    """Takes [B, T, H] or [B*T, H]; a router of nobody's library."""

    def __init__(self):
        super().__init__(6, 5)

    def forward(self, x):
        logits = super().forward(x)
        weights, expert_ids = logits.softmax(-1).topk(2)
        return logits, weights, expert_ids


def test_a_dense_model_is_refused():
    dense = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**COMMON))
    with pytest.raises(ValueError, match=r"mixture-of-experts routers, got LlamaForCausalLM.*It looks dense"):
        RouterCapture(dense)


def test_an_unknown_router_is_refused_with_what_looks_like_one():
    class ForeignGate(nn.Linear):
        pass

    with pytest.raises(ValueError, match=r"ForeignGate.*name the router in a RouterAdapter"):
        RouterCapture(nn.Sequential(nn.Linear(4, 4), ForeignGate(4, 4)))


def test_a_block_that_bypasses_its_router_is_an_error():
    model = tiny_model("olmoe")
    capture = RouterCapture(model).attach()
    block = blocks_of(capture)["model.layers.1.mlp.gate"]
    block.forward = lambda hidden: hidden  # a fused kernel, for all that the router knows
    model(token_ids(B, T))
    with pytest.raises(RuntimeError, match=r"1 of 2 routers.*\['model\.layers\.1\.mlp\.gate'\] did not run.*replaced"):
        capture.trace()


@pytest.mark.parametrize(
    ("output", "found"),
    [
        (lambda logits: logits, r"one tensor of shape \[3, 17, 5\]"),
        (lambda logits: (logits, logits.topk(2).indices), r"\(\[3, 17, 5\] torch.float32, \[3, 17, 2\] torch.int64\)"),
        (lambda logits: (logits, logits, logits), "integer expert ids"),
        (lambda logits: (logits, None, logits.topk(2).indices[0]), r"\[17, 2\] torch.int64"),
        (lambda logits: {"logits": logits}, "dict"),
    ],
)
def test_a_router_that_returns_something_else_is_an_error(output, found):
    class WrongTopKRouter(ToyTopKRouter):
        def forward(self, x):
            return output(nn.Linear.forward(self, x))

    model = nn.Sequential(WrongTopKRouter())
    with (
        RouterCapture(model),
        pytest.raises(TypeError, match=rf"(?s)router '0' \(WrongTopKRouter\) must return.*{found}.*RouterAdapter\("),
    ):
        model(torch.randn(B, T, 6))


def test_an_adapter_makes_a_foreign_router_known():
    class ForeignGate(ToyTopKRouter):
        def forward(self, x):
            logits, weights, expert_ids = super().forward(x)
            return expert_ids, weights, -logits

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = ForeignGate()

        def forward(self, x):
            self.gate(x.flatten(0, 1))
            return x

    model = nn.Sequential(Block(), Block())
    adapter = RouterAdapter(r"^ForeignGate$", logits=2, expert_ids=0, scores=lambda router, logits: -logits)
    with RouterCapture(model, [adapter]) as capture:
        model(torch.randn(B, T, 6))
    trace = capture.trace()
    assert trace.layer_names == ("0.gate", "1.gate")
    for layer in trace:
        assert torch.equal(layer.scores.topk(2).indices, layer.expert_ids)


class Experts(nn.Module):
    """Routed experts of nobody's library, given ids."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 6))

    def forward(self, x, expert_ids, weights):
        return x + (self.weight[expert_ids] * weights[..., None]).sum(dim=-2)


class PlainGateBlock(nn.Module):
    """A block whose gate returns logits alone, [B*T, E]; ``choose`` makes ids of them."""

    def __init__(self, choose=lambda logits: logits.topk(2).indices):
        super().__init__()
        self.gate = nn.Linear(6, 5)
        self.experts = Experts()
        self.choose = choose

    def forward(self, x):
        logits = self.gate(x.flatten(0, 1))
        ids = self.choose(logits)
        return self.experts(x.flatten(0, 1), ids, logits.softmax(-1).gather(-1, ids)).view_as(x)


def test_an_unknown_router_is_read_by_what_the_experts_receive():
    model, received = nn.Sequential(PlainGateBlock(), PlainGateBlock()), []
    for block in model:
        block.experts.register_forward_pre_hook(lambda _, inputs: received.append(inputs[1]))
    with RouterCapture(model) as capture:
        model(torch.randn(B, T, 6))
    trace = capture.trace()
    assert trace.layer_names == ("0.gate", "1.gate")
    for layer, ids in zip(trace, received, strict=True):
        assert layer.num_experts == 5
        assert torch.equal(layer.expert_ids, ids.view(B, T, 2))
    assert all(gradient.any() for gradient in router_gradients(model, capture, LOSS(trace)))


def test_an_unknown_router_is_read_by_the_shapes_that_it_returns():
    class StrangeGate(nn.Linear):
        def forward(self, x):
            logits = super().forward(x)
            weights, ids = logits.softmax(-1).topk(2)
            return {"ids": ids.int(), "weights": weights, "logits": logits, "loss": logits.mean()}

    class Block(PlainGateBlock):
        def __init__(self):
            super().__init__()
            self.gate = StrangeGate(6, 5)

        def forward(self, x):
            routed = self.gate(x)
            return self.experts(x, routed["ids"], routed["weights"])

    model = nn.Sequential(Block())
    with RouterCapture(model) as capture:
        model(torch.randn(B, T, 6))
    (layer,) = capture.trace()
    assert torch.equal(layer.scores.topk(2).indices, layer.expert_ids)


def test_unknown_routers_beside_known_ones_are_not_overlooked():
    model = tiny_model("olmoe")
    model.extra = PlainGateBlock()
    assert RouterCapture(model).layer_names[-1] == "extra.gate"


def test_an_unknown_router_that_selects_by_something_else_is_refused():
    bias = torch.tensor([3.0, -3.0, 0.0, 0.0, 0.0])
    model = nn.Sequential(PlainGateBlock(lambda logits: (logits + bias).topk(2).indices))
    with RouterCapture(model) as capture:
        model(torch.randn(B, T, 6))
    with pytest.raises(ValueError, match=r"(?s)router '0\.gate'.*not the top of its logits.*RouterAdapter\("):
        capture.trace()
    adapter = RouterAdapter(
        r"^Linear$", path=r"\.gate$", logits=None, expert_ids=None, scores=lambda router, logits: logits + bias
    )
    with RouterCapture(model, [adapter]) as capture:
        model(torch.randn(B, T, 6))
    (layer,) = capture.trace()
    assert torch.equal(layer.scores.topk(2).indices, layer.expert_ids)


def test_an_unknown_router_that_leaves_a_doubt_is_refused():
    class TwoGates(PlainGateBlock):
        def __init__(self):
            super().__init__()
            self.router = nn.Linear(6, 5)

    with pytest.raises(ValueError, match=r"(?s)TwoGates at '0' has routed experts.*\['gate', 'router'\], any of which"):
        RouterCapture(nn.Sequential(TwoGates()))

    class TwoOutputs(nn.Linear):
        def forward(self, x):
            logits = super().forward(x)
            return logits, logits.softmax(-1)

    model = nn.Sequential(PlainGateBlock())
    model[0].gate = TwoOutputs(6, 5)
    with RouterCapture(model), pytest.raises(TypeError, match=r"what it returns is ambiguous.*\[51, 5\]"):
        model(torch.randn(B, T, 6))


def test_experts_without_a_router_are_refused():
    model = nn.Sequential(PlainGateBlock())
    model[0].gate = None
    with pytest.raises(
        ValueError, match=r"(?s)has routed experts \(Experts\) but no module beside them.*RouterAdapter\("
    ):
        RouterCapture(model)


def test_experts_that_are_called_one_by_one_need_an_adapter():
    """Blocks as written before transformers 5: a linear gate and a list of experts."""

    class ListBlock(PlainGateBlock):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(5))

        def forward(self, x):
            weights, ids = self.gate(x).softmax(-1).topk(2)
            outputs = torch.stack([expert(x) for expert in self.experts], dim=-2)
            return (outputs.gather(-2, ids[..., None].expand(*ids.shape, 6)) * weights[..., None]).sum(dim=-2)

    model = nn.Sequential(ListBlock())
    with RouterCapture(model) as capture:
        model(torch.randn(B, T, 6))
    with pytest.raises(RuntimeError, match=r"(?s)expert ids are not known of.*'0\.gate'.*RouterAdapter\("):
        capture.trace()
    with RouterCapture(model, [RouterAdapter(r"^Linear$", path=r"\.gate$", logits=None, top_k=2)]) as capture:
        model(torch.randn(B, T, 6))
    assert capture.trace().layers[0].expert_ids.shape == (B, T, 2)


@pytest.mark.parametrize(
    ("adapter", "error", "message"),
    [
        (RouterAdapter("Toy", logits=1, expert_ids=0), TypeError, r"must return logits.*position 1.*float32"),
        (RouterAdapter("Toy", logits=1), TypeError, r"must return.*logits \[3, 17, 2\] and ids \[3, 17, 3\]"),
        (RouterAdapter("Toy", top_k=9), TypeError, r"must return.*at the top of the logits"),
        (RouterAdapter("Toy", logits=lambda output: None), TypeError, r"must return.*at what the adapter reads"),
        (RouterAdapter("Toy", scores=lambda router, logits: logits[..., :2]), ValueError, r"scores.*\[3, 17, 2\]"),
        (RouterAdapter("Toy", scores=lambda router, logits: logits.argsort()), TypeError, "scores.*floating point"),
        (RouterAdapter("Toy", score_function="relu"), ValueError, "score_functions.*'relu'"),
    ],
)
def test_an_adapter_that_reads_something_else_is_an_error(adapter, error, message):
    class ToyRouter(ToyTopKRouter):
        def forward(self, x):
            logits = nn.Linear.forward(self, x)
            return logits, logits.topk(2).values, logits.topk(3).indices

    def capture_one():
        with RouterCapture(nn.Sequential(ToyRouter()), [adapter]) as capture:
            capture.model(torch.randn(B, T, 6))
        return capture.trace()

    with pytest.raises(error, match=message):
        capture_one()


def test_rows_that_cannot_be_told_need_the_mask():
    model = nn.Sequential(ToyTopKRouter())
    with RouterCapture(model) as capture:
        model(torch.randn(B * T, 6))
    with pytest.raises(RuntimeError, match="give `valid` to trace"):
        capture.trace()
    assert capture.trace(valid=torch.ones(B, T, dtype=torch.bool)).shape == (B, T)
    with pytest.raises(ValueError, match="valid must cover the tokens of the forward, got 3 x 4 for 51"):
        capture.trace(valid=torch.ones(B, 4, dtype=torch.bool))
