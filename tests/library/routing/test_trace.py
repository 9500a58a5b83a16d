"""RoutingTrace: what it holds, and that wrong input is refused with the argument's name."""

import pytest
import torch

from consistency_reg import RoutingTrace
from consistency_reg.routing import check_expert_ids

B, T, K, E = 2, 5, 2, 4


def ids(*shape, dtype=torch.int64):
    return torch.arange(K).expand(*(shape or (B, T, K))).to(dtype)


def scores(*shape, **options):
    return torch.zeros(*(shape or (B, T, E)), **options)


def test_a_trace_holds_its_layers_in_order():
    logits = [torch.randn(B, T, 4), torch.randn(B, T, 6)]
    chosen = [logits[0].topk(2).indices, logits[1].topk(3).indices]
    trace = RoutingTrace(chosen, [4, 6], logits=logits, layer_names=["a", "b"], score_functions=["softmax", "sigmoid"])
    assert len(trace) == 2
    assert trace.shape == (B, T)
    assert [(layer.name, layer.num_experts, layer.top_k) for layer in trace] == [("a", 4, 2), ("b", 6, 3)]
    for layer, expert_ids, values in zip(trace, chosen, logits, strict=True):
        assert layer.expert_ids is expert_ids
        assert layer.logits is values
        assert layer.scores is values  # a softmax router selects by its logits


def test_one_number_of_experts_serves_all_layers():
    trace = RoutingTrace([ids(), ids()], E)
    assert [layer.num_experts for layer in trace] == [E, E]
    assert [layer.name for layer in trace] == ["layer_00", "layer_01"]
    assert all(layer.scores is None for layer in trace)


def test_scores_of_a_router_that_does_not_select_by_its_logits():
    logits, selected_by = torch.randn(B, T, E), torch.randn(B, T, E)
    (layer,) = RoutingTrace([ids()], E, scores=[selected_by], logits=[logits])
    assert layer.scores is selected_by
    assert layer.logits is logits


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_probabilities(dtype):
    logits = torch.randn(B, T, E).to(dtype)
    trace = RoutingTrace([ids()] * 2, E, logits=[logits] * 2, score_functions=["softmax", "sigmoid"])
    softmax, sigmoid = (layer.probabilities for layer in trace)
    better = torch.float64 if dtype == torch.float64 else torch.float32
    assert softmax.dtype == sigmoid.dtype == better
    weights = 1 / (1 + torch.exp(-logits.double()))
    torch.testing.assert_close(softmax.double(), logits.double().softmax(-1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sigmoid.double(), weights / weights.sum(-1, keepdim=True), rtol=1e-5, atol=1e-6)


def test_probabilities_need_logits():
    (layer,) = RoutingTrace([ids()], E)
    with pytest.raises(ValueError, match=r"layer_00.*logits"):
        _ = layer.probabilities


def test_positions_count_within_documents():
    valid = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 1]]).bool()
    document_ids = torch.tensor([[3, 3, 1, 1, 3], [0, 0, 0, 0, 0]])
    trace = RoutingTrace([ids()], E, valid=valid, document_ids=document_ids)
    assert trace.positions.tolist() == [[0, 1, 0, 1, 0], [-1, 0, 1, -1, 0]]
    assert trace.valid_mask is valid


def test_without_masks_every_row_is_one_document():
    trace = RoutingTrace([ids()], E)
    assert trace.positions.tolist() == [[0, 1, 2, 3, 4]] * B
    assert trace.valid_mask.all()
    assert trace.valid_mask.shape == (B, T)


def test_detach_drops_the_graph_and_keeps_the_rest():
    logits = scores(requires_grad=True)
    valid = torch.ones(B, T, dtype=torch.bool)
    document_ids = torch.zeros(B, T, dtype=torch.int32)
    trace = RoutingTrace([ids()], E, scores=[logits * 2], logits=[logits * 1], valid=valid, document_ids=document_ids)
    detached = trace.detach()
    assert trace.layers[0].scores.requires_grad
    assert not detached.layers[0].scores.requires_grad
    assert not detached.layers[0].logits.requires_grad
    assert detached.valid is valid
    assert detached.document_ids is document_ids
    assert RoutingTrace([ids()], E).detach().layers[0].scores is None


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, r"expert_ids must be a sequence.*write \[expert_ids\]", {"expert_ids": ids()}),
        (ValueError, "expert_ids must hold at least one layer", {"expert_ids": []}),
        (TypeError, "expert_ids of layer 'layer_00'.*int64.*int32", {"expert_ids": [ids(dtype=torch.int32)]}),
        (ValueError, r"expert_ids of layer 'layer_00'.*\[B, T, K\].*\[5, 2\]", {"expert_ids": [ids(T, K)]}),
        (ValueError, r"expert_ids of layer 'layer_01'.*\[2, 5\].*\[2, 4\]", {"expert_ids": [ids(), ids(B, 4, K)]}),
        (ValueError, "num_experts=1.*K=2", {"num_experts": 1}),
        (ValueError, "num_experts must have one entry for each of the 1 layers.*got 2", {"num_experts": [E, E]}),
        (ValueError, "scores must have one entry.*got 2", {"scores": [scores(), scores()]}),
        (TypeError, "scores of layer 'layer_00' must be floating point.*int64", {"scores": [ids(B, T, K)]}),
        (ValueError, r"scores of layer 'layer_00'.*\[B, T, E\].*\[2, 5, 3\]", {"scores": [scores(B, T, 3)]}),
        (ValueError, r"logits of layer 'layer_00'.*\[B, T, E\].*\[10, 4\]", {"logits": [scores(B * T, E)]}),
        (TypeError, "valid must be a bool tensor.*int64", {"valid": torch.ones(B, T, dtype=torch.int64)}),
        (ValueError, r"valid must have shape.*\[2, 5\].*\[5, 2\]", {"valid": torch.ones(T, B, dtype=torch.bool)}),
        (TypeError, "document_ids must be an integer.*float32", {"document_ids": torch.zeros(B, T)}),
        (TypeError, "document_ids must be an integer.*bool", {"document_ids": torch.zeros(B, T, dtype=torch.bool)}),
        (ValueError, r"document_ids must have shape.*\[5\]", {"document_ids": torch.zeros(T, dtype=torch.int64)}),
        (ValueError, "layer_names must have one entry.*got 2", {"layer_names": ["a", "b"]}),
        (ValueError, "score_functions of layer 'layer_00'.*softmax.*got 'relu'", {"score_functions": ["relu"]}),
    ],
)
def test_wrong_input_is_refused(error, message, arguments):
    with pytest.raises(error, match=message):
        RoutingTrace(**({"expert_ids": [ids()], "num_experts": E} | arguments))


def test_values_are_read_only_on_request():
    wrong = ids().clone()
    wrong[1, 3] = torch.tensor([0, E])
    trace = RoutingTrace([ids(), wrong], E, scores=[scores(), scores()])
    with pytest.raises(ValueError, match=r"expert_ids of layer 'layer_01' must lie in 0\.\.3.*from 0 to 4"):
        trace.check_values()


@pytest.mark.parametrize(
    ("token", "message"),
    [([-1, 0], r"must lie in 0\.\.3.*from -1 to"), ([2, 2], r"must not repeat an expert.*\[2, 2\]")],
)
def test_ids_of_a_token_must_be_distinct_experts(token, message):
    wrong = ids().clone()
    wrong[0, 1] = torch.tensor(token)
    with pytest.raises(ValueError, match=message):
        RoutingTrace([wrong], E).check_values()


def test_what_a_router_says_of_padding_does_not_matter():
    wrong = ids().clone()
    wrong[0, 1] = torch.tensor([-100, -100])
    valid = torch.ones(B, T, dtype=torch.bool)
    valid[0, 1] = False
    RoutingTrace([wrong], E, valid=valid).check_values()
    RoutingTrace([wrong], E, valid=torch.zeros_like(valid)).check_values()


def test_nan_scores_are_found():
    broken = scores()
    broken[1, 2, 3] = float("nan")
    with pytest.raises(ValueError, match="scores of layer 'layer_00' must be numbers, got NaN"):
        RoutingTrace([ids()], E, scores=[broken]).check_values()
    real = torch.ones(B, T, dtype=torch.bool)
    real[1, 2] = False
    RoutingTrace([ids()], E, scores=[broken], valid=real).check_values()


def test_check_expert_ids_names_the_argument():
    with pytest.raises(ValueError, match="my_ids must lie in"):
        check_expert_ids(torch.tensor([[[7]]]), 4, name="my_ids")
