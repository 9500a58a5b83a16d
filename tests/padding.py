"""Assert that padding has no effect on a loss, whatever scores and ids stand there."""

import copy

import torch

from consistency_reg import RoutingTrace


def assert_padding_has_no_effect(loss, logits, ids, num_experts, valid, junk):
    """Assert that value and gradient are the same for every (score, id) of ``junk`` there; return the gradient."""
    results = []
    for junk_score, junk_id in junk:
        leaf = logits.masked_fill(~valid[:, :, None], junk_score).requires_grad_()
        held = ids.masked_fill(~valid[:, :, None], junk_id)
        value = copy.deepcopy(loss)(RoutingTrace([held], num_experts, logits=[leaf], valid=valid))
        value.backward()
        assert (leaf.grad[~valid] == 0).all()
        results.append((value.item(), leaf.grad))
    for value, gradient in results:
        assert value == results[0][0]
        assert torch.equal(gradient, results[0][1])
    return results[0][1]
