"""Routing that knows the cache, on tiny models of transformers."""

import copy
import pickle
from contextlib import contextmanager

import pytest
import torch
from architectures import draw_routers
from forced_choice import Forced
from tiny_architectures import build
from tiny_models import tiny_model, token_ids
from torch import nn
from torch.utils.checkpoint import checkpoint

from consistency_reg import RouterCapture
from consistency_reg.capture import RouterAdapter, Weighing
from consistency_reg.functional import cache_aware_ids
from consistency_reg.rerouting import CacheAwareRouting

STRENGTH = 0.3


def model_of(kind="olmoe"):
    """A model whose routers tell tokens apart."""
    model = tiny_model(kind).eval()
    draw_routers(RouterCapture(model))
    return model


@contextmanager
def chosen(routing):
    """What every call of the first router chose: [(B*T, K), ...]."""
    calls = []
    router = next(iter(routing._routers.values())).module
    handle = router.register_forward_hook(lambda module, args, output: calls.append(output[2]))
    yield calls
    handle.remove()


def routes(model, ids, **kwargs):
    """[L] the chosen ids of one forward, each sorted."""
    with RouterCapture(model) as capture, torch.no_grad():
        model(ids, use_cache=False, **kwargs)
    return [layer.expert_ids.sort(-1).values for layer in capture.trace()]


def assert_same(first, second):
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def lru_hits(expert_ids, scores, slots):
    """Uses of experts that a cache of the most recent ones held before the token, [B, T, K] ids."""
    hits = 0
    for row, row_scores in zip(expert_ids.tolist(), scores.tolist(), strict=True):
        recent = []  # the latest first
        for ids, z in zip(row, row_scores, strict=True):
            hits += len(set(ids) & set(recent[:slots]))
            best_first = sorted(ids, key=lambda expert: -z[expert])
            recent = best_first + [expert for expert in recent if expert not in ids]
    return hits


# --- one forward --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["prior", "max_rank", "cumulative"])
def test_the_capture_sees_what_was_chosen_and_the_scores_as_they_were(method):
    model, ids = model_of("deepseek_v3"), token_ids(3, 24)
    before, after = RouterCapture(model), RouterCapture(model)
    strength = {"prior": STRENGTH, "max_rank": 4, "cumulative": 0.8}[method]
    with before, CacheAwareRouting(model, 1.5, strength, method=method) as routing, after, torch.no_grad():
        model(ids)
    hits = 0
    for layer, other in zip(before.trace(), after.trace(), strict=True):
        if method != "cumulative":  # which compares the router's probabilities
            assert torch.equal(layer.expert_ids, cache_aware_ids(layer.scores, 2, 3, strength, method=method))
        assert torch.equal(other.expert_ids, layer.expert_ids)
        assert torch.equal(other.scores, layer.scores)
        own = layer.scores.topk(2).indices.sort(-1).values
        assert not torch.equal(layer.expert_ids.sort(-1).values, own)
        hits += lru_hits(layer.expert_ids, layer.scores, slots=3)
    assert routing.hits == hits
    assert routing.hits + routing.misses == sum(layer.expert_ids.numel() for layer in after.trace())
    assert sum(routing.layer_hits.values()) == routing.hits
    routing.reset()
    assert (routing.hits, routing.misses) == (0, 0)


def test_strength_0_is_the_model_itself_and_counts():
    model, ids = model_of(), token_ids(2, 24)
    own = model(ids).logits
    with CacheAwareRouting(model, strength=0) as routing:
        assert torch.equal(model(ids).logits, own)
    with RouterCapture(model) as capture, torch.no_grad():
        model(ids)
    assert routing.hits == sum(lru_hits(layer.expert_ids, layer.scores, slots=4) for layer in capture.trace()) > 0


def test_it_leaves_the_model_as_it_was():
    model, ids = model_of(), token_ids(2, 24)
    own, state = model(ids).logits, set(model.state_dict())
    with CacheAwareRouting(model, strength=STRENGTH):
        assert not torch.equal(model(ids).logits, own)
        assert torch.equal(copy.deepcopy(model)(ids).logits, own)
        assert torch.equal(pickle.loads(pickle.dumps(model))(ids).logits, own)
        assert set(model.state_dict()) == state
    assert torch.equal(model(ids).logits, own)
    assert not model.model._forward_pre_hooks


def test_every_document_of_a_packed_row_begins_with_an_empty_cache():
    model, ids = model_of(), token_ids(1, 30)
    with CacheAwareRouting(model, 1.5, STRENGTH) as routing:
        parts = [*routes(model, ids[:, :13]), *routes(model, ids[:, 13:])]
        apart = routing.hits
        routing.reset()
        position_ids = torch.cat([torch.arange(13), torch.arange(17)])[None]
        packed = routes(model, ids, position_ids=position_ids)
    L = len(packed)
    assert_same(packed, [torch.cat([parts[i], parts[L + i]], dim=1) for i in range(L)])
    assert routing.hits == apart


def test_padding_neither_fills_the_cache_nor_is_counted():
    model, ids = model_of(), token_ids(2, 20)
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[1, :7] = 0
    ids[1, :7] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with CacheAwareRouting(model, 1.5, STRENGTH) as routing:
        together = routes(model, ids, attention_mask=mask, position_ids=positions)
        counted = routing.hits + routing.misses
        alone = routes(model, ids[1:, 7:])
    assert counted == mask.sum() * 2 * len(together)
    assert_same([layer[1:, 7:] for layer in together], alone)


# --- generation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model_type", ["olmoe", "deepseek_v3", "dbrx", "gemma4_text", "llama4_text", "jamba", "switch_transformers"]
)
def test_generation_with_a_kv_cache_chooses_as_one_forward(model_type):
    model, inputs, kind = build(model_type)
    draw_routers(RouterCapture(model))
    with CacheAwareRouting(model, 1.5, STRENGTH) as routing, torch.no_grad():
        options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
        text = model.generate(**inputs, **options, attention_mask=torch.ones_like(inputs["input_ids"]))
        generated = routing.layer_hits, routing.layer_misses
        routing.reset()
        if kind == "encoder-decoder":
            model(input_ids=inputs["input_ids"], decoder_input_ids=text[:, :-1])
        else:
            model(text[:, :-1])
    assert (routing.layer_hits, routing.layer_misses) == generated
    assert routing.hits > 0


def test_rows_of_a_padded_batch_generate_as_each_alone():
    model, ids = model_of(), token_ids(2, 16)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    ids[0, :9] = 0
    options = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
    with CacheAwareRouting(model, 1.5, STRENGTH):
        together = model.generate(ids, attention_mask=mask, **options)
        alone = model.generate(ids[:1, 9:], attention_mask=mask[:1, 9:], **options)
        other = model.generate(ids[1:], attention_mask=mask[1:], **options)
    assert torch.equal(together[0, 9:], alone[0])
    assert torch.equal(together[1], other[0])


def test_beams_keep_their_caches():
    model, ids = model_of("mixtral"), token_ids(2, 10)
    options = {"num_beams": 3, "max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
    with CacheAwareRouting(model, 1.5, 0.5) as routing:
        plain = model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **options)
        routing.reset()
        assert torch.equal(model.generate(ids, attention_mask=torch.ones_like(ids), **options), plain)


def follow(model, text, cache, start):
    """Go on token by token; [L] the last token's ids."""
    for t in range(start, text.shape[1]):
        with RouterCapture(model, generation=True) as capture, torch.no_grad():
            model(text[:, t : t + 1], past_key_values=cache)
    return [layer.expert_ids.sort(-1).values for layer in capture.trace()]


def test_reordered_selected_and_repeated_rows_take_their_caches_along():
    model, ids = model_of(), token_ids(3, 20)
    with CacheAwareRouting(model, 1.5, STRENGTH), torch.no_grad():
        cache = model(ids[:, :12], use_cache=True).past_key_values
        cache.reorder_cache(torch.tensor([2, 0, 0]))
        cache.batch_select_indices(torch.tensor([0, 1]))
        cache.batch_repeat_interleave(2)
        text = torch.cat([ids[[2, 2, 0, 0], :12], token_ids(4, 8, seed=1)], dim=1)
        last = follow(model, text, cache, 12)
        assert_same(last, [layer[:, -1:] for layer in routes(model, text)])


def test_generations_that_take_turns_and_copies_of_a_kv_cache_keep_apart():
    model, ids = model_of(), token_ids(2, 20)
    with CacheAwareRouting(model, 1.5, STRENGTH), torch.no_grad():
        first = model(ids[:, :12], use_cache=True).past_key_values
        second = model(token_ids(2, 9, seed=1), use_cache=True).past_key_values
        copied = copy.deepcopy(first)
        routes(model, token_ids(3, 7))  # whole sequences between
        other = torch.cat([ids[:, :12], token_ids(2, 8, seed=2)], dim=1)
        follow(model, other, copied, 12)
        copied.reorder_cache(torch.tensor([1, 0]))
        follow(model, token_ids(2, 12, seed=1), second, 9)
        last = follow(model, ids, first, 12)
        assert_same(last, [layer[:, -1:] for layer in routes(model, ids)])
        last = follow(model, torch.cat([other, ids[:, :1]], dim=1)[[1, 0]], copied, 20)
        assert_same(last, [layer[:, -1:] for layer in routes(model, torch.cat([other, ids[:, :1]], dim=1)[[1, 0]])])


def test_rows_that_change_under_a_running_cache_are_refused():
    model, ids = model_of(), token_ids(3, 12)
    with CacheAwareRouting(model, strength=STRENGTH), torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="rows of its KV cache, got 2 rows for caches of experts of 3"):
            model(ids[:2, :1], past_key_values=cache)


def test_a_kv_cache_that_was_cut_is_refused_and_an_empty_one_begins_anew():
    model, ids = model_of(), token_ids(2, 12)
    with CacheAwareRouting(model, strength=STRENGTH) as routing, torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        cache.crop(-4)
        with pytest.raises(RuntimeError, match="held 12 tokens after the last forward and holds 8 now"):
            model(ids[:, 8:9], past_key_values=cache)
        routing.reset()
        model(ids[:, 8:9], past_key_values=cache)
        assert routing.hits == 0


# --- training -----------------------------------------------------------------------------------------------------


def gradients(model, ids):
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("kind", ["olmoe", "deepseek_v3", "granite_moe_shared"])
def test_the_gradient_is_that_of_the_routers_own_code_for_the_choice(kind, monkeypatch):
    """It flows through the weights of the chosen experts, as it always does."""
    model, ids = model_of(kind), token_ids(2, 12)
    with CacheAwareRouting(model, 1.5, STRENGTH), RouterCapture(model) as capture:
        changed = gradients(model, ids)
    for layer in capture.trace().detach():
        router = capture.routers[layer.name]

        def forced(*args, own=router.forward, layer=layer):
            with Forced(layer.expert_ids.flatten(0, 1), layer.num_experts):
                return own(*args)

        monkeypatch.setattr(router, "forward", forced)
    expected = gradients(model, ids)
    assert any("gate" in name or "router" in name for name in expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(changed[name], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_chooses_the_same_again(reentrant):
    model, ids = model_of().train(), token_ids(2, 12)
    with CacheAwareRouting(model, 1.5, STRENGTH) as routing:
        plain = gradients(model, ids)
        hits = routing.hits
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        routing.reset()
        again = gradients(model, ids)
        assert routing.hits == hits
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient)


def test_checkpointing_of_several_forwards_before_one_backward():
    model, first, second = model_of().train(), token_ids(2, 12), token_ids(2, 12, seed=1)
    with CacheAwareRouting(model, 1.5, STRENGTH):
        expected = gradients(model, first)
        for name, gradient in gradients(model, second).items():
            expected[name] += gradient
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        (model(first, labels=first).loss + model(second, labels=second).loss).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_a_whole_model_within_a_checkpoint():
    model, ids = model_of().train(), token_ids(2, 12)
    with CacheAwareRouting(model, 1.5, STRENGTH) as routing:
        plain, hits = gradients(model, ids), routing.hits
        routing.reset()
        model.zero_grad()
        checkpoint(lambda: model(ids, labels=ids).loss, use_reentrant=False).backward()
        assert routing.hits == hits
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, plain[name])


@pytest.mark.usefixtures("compiler")
def test_a_compiled_router_chooses_the_same():
    model, x = nn.Sequential(OddTopKRouter(6, 5)), torch.randn(2, 7, 6)
    adapter = RouterAdapter("^OddTopKRouter$", weights=lambda call, ids: Weighing(normalized=False)(call, ids) ** 2)
    with CacheAwareRouting(model, 1.0, 0.5, guaranteed=0, adapters=[adapter]):
        eager = model(x)
        for part, expected in zip(torch.compile(model, backend="eager")(x), eager, strict=True):
            torch.testing.assert_close(part, expected)


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_compiled_model_chooses_the_same(backend):
    model, ids = model_of("mixtral"), token_ids(2, 12)
    with CacheAwareRouting(model, 1.5, STRENGTH) as routing:
        eager, hits = gradients(model, ids), routing.hits
        routing.reset()
        compiled = torch.compile(model, backend=backend)
        model.zero_grad()
        compiled(ids, labels=ids).loss.backward()
        assert routing.hits == hits
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, eager[name], rtol=1e-4, atol=1e-6)


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [-0.1, float("nan"), float("inf"), "0.1", None])
def test_a_strength_that_is_none_is_refused(strength):
    with pytest.raises(ValueError, match="strength must be a finite number of at least 0"):
        CacheAwareRouting(model_of(), strength=strength)


@pytest.mark.parametrize("cache_ratio", [0.5, 0, -1, float("nan"), float("inf"), "2"])
def test_fewer_slots_than_experts_of_a_token_are_refused(cache_ratio):
    with pytest.raises(ValueError, match="cache_ratio must be a number of at least 1"):
        CacheAwareRouting(model_of(), cache_ratio)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"guaranteed": 3}, r"router 'model\.layers\.0.*: guaranteed must lie in 0\.\.top_k=2, got 3"),
        ({"guaranteed": -1}, r"guaranteed must lie in 0\.\.top_k=2, got -1"),
        ({"method": "best"}, r"method must be one of .*, got 'best'"),
        ({"method": "cumulative", "strength": 1.5}, "must be a probability"),
        ({"method": "max_rank", "strength": 1.5}, "a whole number"),
        ({"layers": "nothing"}, "layers must match the name of at least one router"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused_before_the_first_forward(options, said):
    with pytest.raises(ValueError, match=said):
        CacheAwareRouting(model_of(), **options)


def test_settings_may_change_later_and_are_checked_then():
    routing = CacheAwareRouting(model_of())
    routing.strength, routing.cache_ratio = 0.2, 3
    with pytest.raises(ValueError, match="strength must be"):
        routing.strength = -1
    with pytest.raises(ValueError, match="cache_ratio must be"):
        routing.cache_ratio = 0.9
    assert (routing.strength, routing.cache_ratio) == (0.2, 3)


def test_attaching_twice_is_refused_and_detaching_twice_is_not():
    model = model_of()
    routing = CacheAwareRouting(model).attach()
    with pytest.raises(RuntimeError, match=r"is attached to router 'model.layers.0.mlp.gate' .* already"):
        routing.attach()
    with pytest.raises(RuntimeError, match=r"is attached to router .* already"):
        CacheAwareRouting(model).attach()
    routing.detach()
    routing.detach()
    with routing:
        pass


class OddTopKRouter(nn.Linear):
    """Weighs by the square of a softmax."""

    def forward(self, x):
        logits = super().forward(x)
        weights, ids = (logits.softmax(-1) ** 2).topk(2)
        return logits, weights, ids


def test_weights_that_are_not_as_the_adapter_says_are_refused():
    model = nn.Sequential(OddTopKRouter(6, 5))
    with (
        pytest.raises(ValueError, match=r"router '0' \(OddTopKRouter\) does not weigh its experts as its adapter says"),
        CacheAwareRouting(model),
    ):
        model(torch.randn(2, 7, 6))


def test_a_router_with_a_rule_of_its_own_is_told_how_it_weighs():
    model, x = nn.Sequential(OddTopKRouter(6, 5)), torch.randn(2, 7, 6)
    rule = Weighing(normalized=False)
    adapter = RouterAdapter("^OddTopKRouter$", weights=lambda call, ids: rule(call, ids) ** 2)
    with CacheAwareRouting(model, 1.0, 0.5, guaranteed=0, adapters=[adapter]):
        logits, weights, ids = model(x)
    assert torch.equal(weights, logits.softmax(-1).square().gather(-1, ids))
    assert not torch.equal(ids, logits.topk(2).indices)


def test_a_router_of_an_unknown_rule_is_refused_by_name():
    adapter = RouterAdapter("^OddTopKRouter$")
    with pytest.raises(ValueError, match=r"router '0' \(OddTopKRouter\) .* how it weighs .* is not known"):
        CacheAwareRouting(nn.Sequential(OddTopKRouter(6, 5)), adapters=[adapter])


def test_a_table_of_token_ids_is_refused_by_name_and_can_be_left_out():
    model, inputs, _ = build("deepseek_v4")
    with pytest.raises(ValueError, match=r"router 'model.layers.0.mlp.gate' \(DeepseekV4HashRouter\) .* a table"):
        CacheAwareRouting(model)
    with CacheAwareRouting(model, layers=r"layers\.[23]\.") as routing:
        model(**inputs)
    assert list(routing.layer_hits) == ["model.layers.2.mlp.gate", "model.layers.3.mlp.gate"]


def test_a_block_that_by_passes_its_router_is_an_error():
    model, ids = model_of(), token_ids(2, 8)
    for layer in model.model.layers:
        layer.mlp.forward = lambda hidden_states: hidden_states
    with pytest.raises(RuntimeError, match=r"none of the routers .* was called"), CacheAwareRouting(model):
        model(ids)


def test_a_router_on_its_own_is_an_error():
    model = model_of()
    with CacheAwareRouting(model), pytest.raises(RuntimeError, match="ran outside of a forward of the OlmoeModel"):
        model.model.layers[0].mlp.gate(torch.randn(4, 32))


def test_an_error_within_a_forward_leaves_nothing_open():
    model, ids = model_of(), token_ids(2, 8)
    with CacheAwareRouting(model, strength=STRENGTH) as routing:
        expected = model(ids).logits
        handle = model.model.norm.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(ids)
        handle.remove()
        assert not routing._forwards._stacks[0].open
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=0)
