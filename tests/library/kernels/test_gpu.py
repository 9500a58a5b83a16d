"""On a GPU every loss has the value and the gradient that it has on a CPU, and every metric its figures."""

import pytest
import torch

from consistency_reg import (
    CacheConsistencyLoss,
    CacheHitRate,
    ExpertSpecialization,
    LoadBalanceLoss,
    LocalConsistencyLoss,
    RouterZLoss,
    RoutingBalance,
    RoutingTrace,
    SegmentCacheHitRate,
    SegmentRoutingPerformance,
)
from consistency_reg.losses import AdjacentLoss, BlockwiseLoss, MelinoeLoss, ReMoELoss, StickyLoss

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

E, K, T = 16, 4, 200
LOSSES = {
    "srp": LocalConsistencyLoss,
    "srp mean": lambda: LocalConsistencyLoss(balance_neutral=True),
    "srp by row": lambda: LocalConsistencyLoss(scope="sequence"),
    "lru": CacheConsistencyLoss,
    "lru probability": lambda: CacheConsistencyLoss(membership="probability"),
    "balance": lambda: LoadBalanceLoss(running=0.9),
    "z": RouterZLoss,
    "remoe": ReMoELoss,
    "sticky": StickyLoss,
    "adjacent": AdjacentLoss,
    "melinoe": MelinoeLoss,
    "bles": BlockwiseLoss,
}


def trace_on(device):
    """Two layers of rows with several documents and padding; the same on every device."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, T, E, generator=generator).cumsum(dim=2).mul(0.3)  # routing that changes slowly
    document_ids = (torch.rand(5, T, generator=generator) < 0.02).cumsum(dim=1).to(device)
    valid = (torch.arange(T) < torch.tensor([[T], [150], [7], [T], [64]])).to(device)
    expert_ids = [layer.topk(K).indices.to(device) for layer in logits]
    on_device = [layer.to(device).requires_grad_() for layer in logits]
    return RoutingTrace(expert_ids, E, logits=on_device, valid=valid, document_ids=document_ids)


@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_of_a_loss(name):
    found = {}
    for device in ("cpu", "cuda"):
        trace, loss = trace_on(device), LOSSES[name]().to(device)
        for _ in range(2):  # the second time with what a running average remembers
            value = loss(trace)
        found[device] = [value.detach().cpu(), *(g.cpu() for g in torch.autograd.grad(value, trace.logits))]
    for on_gpu, right in zip(found["cuda"], found["cpu"], strict=True):
        torch.testing.assert_close(on_gpu, right, rtol=1e-4, atol=1e-7)
    assert any(gradient.any() for gradient in found["cpu"][1:])


@pytest.mark.parametrize(
    "make",
    [
        lambda trace: SegmentRoutingPerformance.from_trace(trace, (4, 16, 64), replicates=20),
        lambda trace: SegmentCacheHitRate.from_trace(trace, 16),
        lambda trace: CacheHitRate.from_trace(trace, "lru"),
        lambda trace: CacheHitRate.from_trace(trace, "belady"),
        lambda trace: RoutingBalance.from_trace(trace),
        lambda trace: ExpertSpecialization.from_trace(trace, num_domains=2, vocab_size=7),
    ],
    ids=["srp", "sch", "lru", "belady", "balance", "specialization"],
)
def test_figures_of_a_metric(make):
    found = {}
    for device in ("cpu", "cuda"):
        trace = trace_on(device)
        metric = make(trace)
        if isinstance(metric, ExpertSpecialization):
            token_ids = torch.arange(5 * T, device=device).view(5, T) % 7
            metric.update(trace, domain_ids=torch.arange(5, device=device) % 2, token_ids=token_ids)
        else:
            metric.update(trace)
        found[device] = {name: value.cpu() for name, value in metric.compute().items()}
    torch.testing.assert_close(found["cuda"], found["cpu"], rtol=1e-6, atol=1e-9, equal_nan=True)
