"""The place that decides by device."""

import pytest
import torch

from consistency_reg import devices
from consistency_reg.functional.cache_aware import cache_aware_choice
from consistency_reg.functional.cache_hits import cache_hit_counts
from consistency_reg.functional.cache_simulation import Simulation, row_hit_rates
from consistency_reg.routing import RoutingTrace


@pytest.fixture
def as_another_accelerator(monkeypatch):
    """Let the CPU pass for a device without kernels whose values are slow to read."""
    monkeypatch.setattr(devices, "is_on_host", lambda tensor: getattr(tensor, "is_moved", False))
    moved = torch.Tensor.cpu

    def cpu(tensor):
        copy = moved(tensor).clone()
        copy.is_moved = True
        return copy

    monkeypatch.setattr(torch.Tensor, "cpu", cpu)


def test_a_cpu_has_no_kernels():
    assert devices.is_on_host(torch.zeros(1))
    assert not devices.has_kernels(torch.zeros(1))
    assert not devices.is_on_host(torch.zeros(1, device="meta"))


def test_caches_of_another_accelerator_are_simulated_on_the_cpu(request):
    ids = torch.rand(2, 12, 6, generator=torch.Generator().manual_seed(0)).topk(2).indices
    scores = torch.rand(2, 12, 6, generator=torch.Generator().manual_seed(1))

    def everything():
        trace = RoutingTrace([ids], 6)
        counts = cache_hit_counts(ids, 6, "lru")
        return (
            counts.hits,
            row_hit_rates(trace, Simulation("lru")).total,
            cache_aware_choice(scores, 2, 3, 0.3).expert_ids,
        )

    expected = everything()
    request.getfixturevalue("as_another_accelerator")
    for found, right in zip(everything(), expected, strict=True):
        assert torch.equal(found, right)
