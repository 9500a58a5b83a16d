"""Hypothesis strategies for routing: ragged documents, padding anywhere, ties, experts that are never used."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import documents

from consistency_reg.routing import RoutingTrace

MANY = 10_000


def on_cases(few, *strategies, many=MANY):
    """Make a check of one case two tests: on ``few`` cases, and as a slow one on ``many``, really that many."""

    def decorate(check):
        def one(case):
            nonlocal passed
            check(*case)
            passed += 1

        one.__name__ = check.__name__  # the name under which Hypothesis remembers what failed
        passed = 0
        slow = pytest.param(many, marks=[pytest.mark.slow, pytest.mark.timeout(2 * 3600)])

        @pytest.mark.parametrize("cases", [few, slow])
        def test(cases):
            nonlocal passed
            passed = 0
            health = [HealthCheck.too_slow, HealthCheck.nested_given]
            run = settings(max_examples=cases, deadline=None, suppress_health_check=health)(
                given(st.tuples(*strategies))(one)
            )
            run()
            assert passed >= cases

        test.__name__, test.__doc__ = check.__name__, check.__doc__
        return test

    return decorate


@dataclass(frozen=True)
class Routing:
    """Holds the routing of one layer as both sides of a comparison want it: tensors for us, arrays for the oracle."""

    expert_ids: torch.Tensor
    num_experts: int
    valid: torch.Tensor
    document_ids: torch.Tensor

    @property
    def masks(self):
        return {"valid": self.valid, "document_ids": self.document_ids}

    @property
    def arrays(self):
        return self.valid.numpy(), self.document_ids.numpy()

    @property
    def tokens(self):
        return int(self.valid.sum())


def trace_of(layers):
    """Return the layers of :func:`models` as one trace."""
    ids, experts = [layer.expert_ids for layer in layers], [layer.num_experts for layer in layers]
    return RoutingTrace(ids, experts, valid=layers[0].valid, document_ids=layers[0].document_ids)


@st.composite
def models(draw, max_layers=3, max_rows=3, max_tokens=12, max_experts=6):
    """Draw the layers of a small model: the same tokens and documents, an E and a K of its own for each layer."""
    N, T = draw(st.integers(1, max_rows)), draw(st.integers(1, max_tokens))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    valid = _valid(draw(st.sampled_from(["none", "right", "left", "anywhere", "all"])), N, T, rng)
    changes = rng.random((N, T)) < draw(st.sampled_from([0.0, 0.2, 0.6]))
    document_ids = changes.cumsum(axis=1) % 3
    return [
        Routing(torch.from_numpy(ids), E, torch.from_numpy(valid), torch.from_numpy(document_ids))
        for ids, E in (_layer(draw, valid, max_experts, rng) for _ in range(draw(st.integers(1, max_layers))))
    ]


def routings(**sizes):
    """Draw small routings of one layer, of every kind; now and then 256 experts, of which most are never used."""
    return models(max_layers=1, **sizes).map(lambda layers: layers[0])


models_with_one_cache = models(max_tokens=10, max_experts=4).filter(
    lambda layers: layers[0].tokens > 0 and sum(layer.num_experts for layer in layers) <= 20
)


def joined_documents(layers):
    """Return the documents with the experts of all layers side by side, and how many experts these are."""
    joined, E = [], 0
    for layer in layers:
        joined.append(layer.expert_ids + E)
        E += layer.num_experts
    ids = torch.cat(joined, dim=-1)
    return [ids[n, first:end].tolist() for n, first, end in documents(*layers[0].arrays)], E


def _layer(draw, valid, max_experts, rng):
    N, T = valid.shape
    E = draw(st.sampled_from([*range(1, max_experts + 1), 256]))
    K = draw(st.integers(1, min(E, 4)))
    used = draw(st.integers(K, E))  # experts from here on are never chosen
    stickiness = draw(st.sampled_from([0.0, 0.5, 0.9, 1.0]))
    ids = np.empty((N, T, K), dtype=np.int64)
    for n in range(N):
        for t in range(T):
            stays = t > 0 and rng.random() < stickiness
            ids[n, t] = ids[n, t - 1] if stays else rng.permutation(used)[:K]
    ids[~valid] = draw(st.sampled_from([-100, 0, 10**6]))  # whatever a router says of padding must not matter
    return ids, E


def _valid(padding, N, T, rng):
    valid = np.ones((N, T), dtype=bool)
    for n in range(N):
        cut = rng.integers(0, T + 1)
        if padding == "right":
            valid[n, cut:] = False
        elif padding == "left":
            valid[n, :cut] = False
        elif padding == "anywhere":
            valid[n] = rng.random(T) < 0.7
        elif padding == "all":
            valid[n] = False
    return valid
