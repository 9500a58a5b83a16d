"""The choice of a router that knows its cache: equal to an LRU cache that is really simulated, in one call or many."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from reference import cache_aware_oracle
from strategies import on_cases, routings

from consistency_reg import functional
from consistency_reg.functional import cache_aware
from consistency_reg.functional.cache_aware import METHODS, CacheAwareState, cache_aware_choice, cache_aware_ids

MASKS = ("valid", "document_ids")


@dataclass(frozen=True)
class Case:
    """Scores of one layer, the settings of the choice, and the masks."""

    scores: torch.Tensor
    options: dict
    masks: dict

    def choose(self, **more):
        return cache_aware_choice(self.scores, **(self.options | self.masks | more))

    def part(self, tokens):
        """The same with some of the tokens only."""
        masks = {name: mask[:, tokens] for name, mask in self.masks.items()}
        return Case(self.scores[:, tokens], self.options, masks)


@st.composite
def cases(draw):
    routing = draw(routings(max_rows=2, max_tokens=14, max_experts=7))
    E = routing.num_experts
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    N, T = routing.valid.shape
    changing = rng.normal(size=(N, T, E)) * draw(st.sampled_from([0.1, 1.0]))
    scores = torch.from_numpy(rng.normal(size=(N, 1, E)) + changing)
    scores[~routing.valid] = torch.nan
    K = draw(st.integers(1, min(E, 4)))
    method = draw(st.sampled_from(METHODS))
    strength = {
        "prior": st.sampled_from([0.0, 0.05, 0.3, 2.0]),
        "max_rank": st.integers(0, E + 1),
        "cumulative": st.floats(0, 1).map(lambda p: round(p, 3)),
    }[method]
    options = {
        "top_k": K,
        "slots": draw(st.integers(K, K + 4)),
        "strength": draw(strength),
        "guaranteed": draw(st.integers(0, K)),
        "method": method,
    }
    return Case(scores, options, routing.masks)


@on_cases(300, cases())
def test_choice_and_hits_equal_those_of_a_simulated_cache(case):
    found = case.choose()
    masks = [case.masks[name].numpy() for name in MASKS]
    options = {name: case.options[name] for name in ("top_k", "slots", "strength", "guaranteed", "method")}
    method = options.pop("method")
    ids, hits = cache_aware_oracle(case.scores.numpy(), *options.values(), *masks, method)
    for at in ids:
        assert found.expert_ids[at].tolist() == ids[at]
        assert found.hits[at].tolist() == hits[at]


@on_cases(150, cases(), st.integers(0, 14), st.integers(0, 14))
def test_a_row_in_parts_gives_the_same_as_in_one_call(case, one, other):
    whole, T = case.choose(), case.scores.shape[1]
    cuts = [0, *sorted(min(cut, T) for cut in (one, other)), T]
    state = None
    for first, end in pairwise(cuts):
        part = case.part(slice(first, end))
        found = part.choose(state=state)
        state = found.state
        real = part.masks["valid"]
        assert torch.equal(found.expert_ids[real], whole.expert_ids[:, first:end][real])
        assert torch.equal(found.hits[real], whole.hits[:, first:end][real])
    assert torch.equal(state.last_use, whole.state.last_use)
    assert torch.equal(state.tokens, whole.state.tokens)
    assert torch.allclose(state.score_range, whole.state.score_range, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_token_by_token_without_masks_gives_the_same_as_in_one_call(method, dtype):
    scores = torch.randn(2, 3, 40, 16, generator=torch.Generator().manual_seed(5)).to(dtype)  # bfloat16 has ties
    options = {"top_k": 4, "slots": 6, "strength": {"prior": 0.2, "max_rank": 8, "cumulative": 0.5}[method]}
    whole, state = cache_aware_choice(scores, **options, method=method), None
    for t in range(scores.shape[-2]):
        found = cache_aware_choice(scores[..., t : t + 1, :], **options, method=method, state=state)
        state = found.state
        assert torch.equal(found.expert_ids, whole.expert_ids[..., t : t + 1, :])
        assert torch.equal(found.residents, whole.residents[..., t : t + 1, :])
    assert torch.equal(state.last_use, whole.state.last_use)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_strength_zero_is_the_routers_own_choice_bit_for_bit_ties_included(dtype, method):
    scores = torch.randn(2, 3, 50, 16, generator=torch.Generator().manual_seed(0)).mul(2).round().to(dtype)
    found = cache_aware_ids(scores, top_k=5, slots=5, strength=0, guaranteed=1, method=method)
    assert torch.equal(found, scores.topk(5).indices)


def test_a_choice_that_is_no_top_k_is_kept_at_strength_zero_and_on_padding():
    scores, own = torch.randn(1, 4, 6), torch.tensor([[[5, 0], [4, 1], [3, 2], [0, 1]]])
    valid = torch.tensor([[False, True, True, True]])
    at_zero = cache_aware_choice(scores, 2, 2, 0.0, own_ids=own)
    assert torch.equal(at_zero.expert_ids, own)
    assert at_zero.residents[0, 1].nonzero().flatten().tolist() == [0, 5]
    assert cache_aware_choice(scores, 2, 2, 0.5, valid=valid, own_ids=own).expert_ids[0, 0].tolist() == [5, 0]


def test_layers_of_one_shape_are_worked_on_each_by_itself():
    scores = torch.randn(3, 2, 20, 8, generator=torch.Generator().manual_seed(1))
    valid = torch.ones(2, 20, dtype=torch.bool)
    valid[0, :7] = False
    together = cache_aware_choice(scores, 2, 4, 0.2, valid=valid)
    for layer, of_layer in enumerate(scores):
        alone = cache_aware_choice(of_layer, 2, 4, 0.2, valid=valid)
        assert torch.equal(together.expert_ids[layer], alone.expert_ids)
        assert torch.equal(together.state.last_use[layer], alone.state.last_use)


def test_a_state_follows_its_beams():
    scores = torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(2))
    kept = torch.tensor([1, 1])
    before = cache_aware_choice(scores[:, :8], 2, 4, 0.3).state.select(kept)
    found = cache_aware_choice(scores[kept, 8:], 2, 4, 0.3, state=before)
    assert torch.equal(found.expert_ids, cache_aware_ids(scores, 2, 4, 0.3)[kept, 8:])


def test_the_state_says_what_the_cache_holds():
    found = cache_aware_choice(torch.eye(4)[None, [0, 1, 2]], 1, 2, 0.0)
    assert found.state.residents(slots=2).tolist() == [[False, True, True, False]]
    assert not CacheAwareState.empty(1, num_experts=4).residents(slots=2).any()


def test_experts_ruled_out_by_minus_infinity_stay_out():
    scores = torch.randn(1, 30, 6, generator=torch.Generator().manual_seed(3))
    allowed = cache_aware_ids(scores[..., :4], 2, 3, 0.4)
    scores[..., 4:] = -torch.inf
    assert torch.equal(cache_aware_ids(scores, 2, 3, 0.4), allowed)


@pytest.mark.parametrize(("method", "strength"), [("prior", 5.0), ("max_rank", 6), ("cumulative", 1.0)])
def test_a_cached_expert_that_a_token_rules_out_stays_out(method, strength):
    """Routers limit each token to its best groups of experts: those of the token before may be out."""
    scores = torch.randn(1, 30, 6, generator=torch.Generator().manual_seed(3))
    scores[:, ::2, 3:] = -torch.inf
    scores[:, 1::2, :3] = -torch.inf
    ids = cache_aware_ids(scores, 2, 4, strength, method=method)
    assert scores.gather(-1, ids).isfinite().all()


def test_a_strong_prior_saves_misses_and_the_guaranteed_are_always_chosen():
    scores = torch.randn(4, 100, 16, generator=torch.Generator().manual_seed(4))
    misses = [int((~cache_aware_choice(scores, 4, 8, strength).hits).sum()) for strength in (0.0, 0.1, 0.3, 1.0)]
    assert misses == sorted(misses, reverse=True)
    assert misses[-1] < misses[0] / 3
    best = scores.topk(2).indices
    assert torch.equal(cache_aware_ids(scores, 4, 8, 50.0, guaranteed=2)[..., :2], best)


def test_given_probabilities_decide_how_far_the_cumulative_threshold_reaches():
    scores = torch.tensor([[[1.0, 0.9, 0.0], [0.9, 1.0, 0.0]]])
    one_is_enough = torch.tensor([[[0.9, 0.1, 0.0], [0.1, 0.9, 0.0]]])
    options = {"top_k": 1, "slots": 1, "strength": 0.6, "guaranteed": 0, "method": "cumulative"}
    assert cache_aware_choice(scores, **options).expert_ids.flatten().tolist() == [0, 0]
    assert cache_aware_choice(scores, **options, probabilities=one_is_enough).expert_ids.flatten().tolist() == [0, 1]


def test_no_rows_and_no_tokens_are_no_choice():
    assert functional.cache_aware_ids(torch.zeros(0, 5, 4), 2, 2, 0.1).shape == (0, 5, 2)
    assert functional.cache_aware_ids(torch.zeros(3, 0, 4), 2, 2, 0.1).shape == (3, 0, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strength": -0.1}, "strength must be a number of at least 0, got -0.1"),
        ({"strength": float("nan")}, "strength must be a number of at least 0, got nan"),
        ({"strength": float("inf")}, "strength must be a number of at least 0, got inf"),
        ({"strength": 0.5, "method": "max_rank"}, "must be a rank, a whole number, got 0.5"),
        ({"strength": 1.5, "method": "cumulative"}, "must be a probability, at most 1, got 1.5"),
        ({"slots": 1}, "slots must be at least top_k=2, the experts that a token uses, got 1"),
        ({"guaranteed": 3}, r"guaranteed must lie in 0..top_k=2, got 3"),
        ({"guaranteed": -1}, r"guaranteed must lie in 0..top_k=2, got -1"),
        ({"top_k": 5}, r"top_k must lie in 1..4, the experts of the layer, got 5"),
        ({"method": "best"}, r"method must be one of \('prior', 'max_rank', 'cumulative'\), got 'best'"),
        ({"scores": torch.zeros(3, 4)}, r"scores must have shape \[..., B, T, E\], got \[3, 4\]"),
        ({"valid": torch.ones(1, 4, dtype=torch.bool)}, r"valid must have shape \[B, T\] = \[1, 3\], got \[1, 4\]"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"scores": torch.zeros(1, 3, 4), "top_k": 2, "slots": 2, "strength": 0.1} | change
    with pytest.raises(ValueError, match=message):
        cache_aware_ids(**arguments)


def test_wrong_types_are_named():
    with pytest.raises(TypeError, match=r"scores must be floating point, got torch\.int64"):
        cache_aware_ids(torch.zeros(1, 3, 4, dtype=torch.int64), 2, 2, 0.1)
    state = cache_aware_choice(torch.zeros(2, 3, 4), 2, 2, 0.1).state
    with pytest.raises(ValueError, match=r"state must be of rows \[1\] and 4 experts, got \[2, 4\]"):
        cache_aware_choice(torch.zeros(1, 3, 4), 2, 2, 0.1, state=state)


@on_cases(100, cases())
def test_the_next_token_is_chosen_the_same_on_every_kind_of_device(case):
    options = case.options | {"method": "prior", "strength": 0.3}
    scores = case.scores.nan_to_num(0.5)
    before = cache_aware_choice(scores, **options).state
    following = scores[:, :1].roll(1, dims=-1)
    here = cache_aware_choice(following, **options, state=before)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_aware, "is_on_host", lambda tensor: False)
        there = cache_aware_choice(following, **options, state=before)
    assert here.expert_ids.equal(there.expert_ids)
    assert here.residents.equal(there.residents)
    for name in ("last_use", "score_range", "tokens", "document_ids"):
        assert getattr(here.state, name).equal(getattr(there.state, name))
