"""A model whose experts are read as tokens need them computes what the model in memory computes."""

import gc
import time
from pathlib import Path

import pytest
import torch
import transformers
from offloading import in_memory, logits, read_by_token, save
from safetensors.torch import load_file, save_file
from tiny_models import COMMON, KINDS, E, K, tiny_model, token_ids

from consistency_reg import CacheAwareRouting, OffloadedExperts, RouterCapture, functional
from consistency_reg.functional.cache_replay import cache_access_hits
from consistency_reg.offload.calibration import calibrate


@pytest.fixture
def olmoe(tmp_path):
    return save(tmp_path / "olmoe", "olmoe")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_those_of_the_model_in_memory_bit_for_bit(kind, dtype, tmp_path):
    folder = save(tmp_path, kind, dtype)
    ids = token_ids(1, 20)
    expected = read_by_token(in_memory(folder), ids, prompt=12)
    with OffloadedExperts(folder, slots=3) as model:
        assert torch.equal(read_by_token(model, ids, prompt=12), expected)
        assert next(model.parameters()).dtype == dtype


def test_a_kernel_of_its_own_is_run_as_it_is(tmp_path):
    config = transformers.GptOssConfig(
        **COMMON, num_local_experts=E, num_experts_per_tok=K, head_dim=16, layer_types=["full_attention"] * 2
    )
    torch.manual_seed(0)
    transformers.GptOssForCausalLM(config).save_pretrained(tmp_path)
    ids = token_ids(2, 9)
    with OffloadedExperts(tmp_path, slots=2) as model:
        assert torch.equal(logits(model, ids), logits(in_memory(tmp_path), ids))


def test_generate_gives_the_same_text(olmoe):
    ids = token_ids(2, 6)
    options = {"max_new_tokens": 12, "do_sample": False}
    with OffloadedExperts(olmoe) as model:
        assert torch.equal(model.generate(ids, **options), in_memory(olmoe).generate(ids, **options))


def test_a_checkpoint_of_one_file_for_one_expert_each_and_of_one_tensor_for_all_gives_the_same(tmp_path, olmoe):
    """transformers saves OLMoE expert by expert; it reads the layout of its own parameters as well."""
    model = in_memory(olmoe)
    whole = tmp_path / "whole"
    model.config.save_pretrained(whole)
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, whole / "model.safetensors")
    assert any(
        name.endswith("experts.0.up_proj.weight")
        for file in Path(olmoe).glob("*.safetensors")
        for name in load_file(file)
    )
    ids = token_ids(1, 8)
    with OffloadedExperts(olmoe) as by_expert, OffloadedExperts(whole) as at_once:
        assert torch.equal(logits(by_expert, ids), logits(at_once, ids))


def test_weights_of_another_dtype_are_converted_as_they_are_read(olmoe):
    ids = token_ids(1, 8)
    whole = in_memory(olmoe, torch.bfloat16)
    with OffloadedExperts(olmoe, dtype="bfloat16") as model:
        assert torch.equal(logits(model, ids), logits(whole, ids))


def test_experts_are_on_the_meta_device_and_slots_hold_what_was_asked_for(olmoe):
    offloaded = OffloadedExperts(olmoe, slots=3, read_ahead=2)
    with offloaded as model:
        experts = [parameter for name, parameter in model.named_parameters() if ".experts." in name]
        assert experts
        assert all(parameter.is_meta for parameter in experts)
        expert_bytes = sum(parameter[0].numel() for parameter in experts) // 2 * 4
        assert offloaded.statistics().slot_bytes == (2 * 3 + 2) * expert_bytes
        logits(model, token_ids(1, 20))
        for layer in range(2):
            assert offloaded.resident_mask(layer).sum() == 3


def test_a_model_in_memory_gets_its_experts_back(olmoe):
    model = in_memory(olmoe)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    ids = token_ids(1, 8)
    expected = logits(model, ids)
    for store in ("host", "disk"):
        with OffloadedExperts(model, store=store) as same:
            assert same is model
            assert torch.equal(logits(model, ids), expected)
            gc.collect()
        after = dict(model.named_parameters())
        assert all(torch.equal(after[name], tensor) and after[name].requires_grad for name, tensor in before.items())
        assert torch.equal(logits(model, ids), expected)


@pytest.mark.parametrize("store", ["host", "disk"])
def test_a_model_gets_the_very_parameters_back_and_frozen_ones_stay_frozen(olmoe, store):
    model = in_memory(olmoe)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.0" not in name)
    before = {name: (parameter, parameter.requires_grad) for name, parameter in model.named_parameters()}
    model(token_ids(1, 4), labels=token_ids(1, 4)).loss.backward()
    with OffloadedExperts(model, store=store):
        assert not any(parameter.requires_grad for parameter in model.parameters())
    for name, parameter in model.named_parameters():
        assert (parameter is before[name][0], parameter.requires_grad) == (True, before[name][1]), name
    model.zero_grad()
    model(token_ids(1, 4), labels=token_ids(1, 4)).loss.backward()


def test_a_model_that_is_not_its_checkpoint_is_not_read_from_it(olmoe):
    model = in_memory(olmoe)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[3] += 1
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts: expert 3 is not the one of .*store='host'"):
        OffloadedExperts(model).attach()
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_the_capture_sees_the_routing_that_the_engine_recorded(olmoe):
    offloaded = OffloadedExperts(olmoe, record=True)
    with offloaded as model, RouterCapture(model) as capture, torch.no_grad():
        model(token_ids(1, 10))
        captured = capture.trace().expert_ids
    for ids, seen in zip(offloaded.routing(), captured, strict=True):
        assert torch.equal(ids, seen[0])


def test_gradients_are_not_silently_wrong(olmoe):
    with OffloadedExperts(olmoe) as model:
        output = model(token_ids(1, 4), labels=token_ids(1, 4))
        with pytest.raises(RuntimeError, match="does not require grad"):
            output.loss.backward()


def test_a_model_is_used_up_behind_its_block(olmoe):
    with OffloadedExperts(olmoe) as model:
        pass
    model.config._experts_implementation_internal = "consistency_reg_offload"
    with pytest.raises(RuntimeError, match="inside of `with OffloadedExperts"):
        logits(model, token_ids(1, 4))


@pytest.mark.parametrize("policy", ["lru", "lfu"])
@pytest.mark.parametrize("slots", [2, 3, 5, 8])
def test_hits_of_decode_are_those_of_the_simulator_to_the_last_access(olmoe, policy, slots):
    offloaded = OffloadedExperts(olmoe, slots=slots, policy=policy, record=True)
    prompt = 5
    with offloaded as model:
        read_by_token(model, token_ids(1, 40), prompt)
        statistics, routing = offloaded.statistics(), offloaded.routing()
    assert [step.tokens for step in statistics.steps] == [prompt] + [1] * 35
    expected = sum(simulated_hits(ids, slots, policy) - simulated_hits(ids[:prompt], slots, policy) for ids in routing)
    assert statistics.decode.hits == expected
    assert statistics.decode.hits + statistics.decode.misses == 2 * 35 * K


def simulated_hits(ids_TK, slots, policy):
    """The simulator's hits of one document from an empty cache."""
    rates = functional.cache_hit_rate(ids_TK[None], E, policy, replay="token", cold="miss")
    return round(rates[slots - 1].item() * ids_TK.numel())


def test_every_access_hits_or_misses_as_in_the_simulator(olmoe):
    offloaded = OffloadedExperts(olmoe, slots=3, record=True)
    with offloaded as model:
        read_by_token(model, token_ids(1, 30), prompt=1)
        statistics, routing = offloaded.statistics(), offloaded.routing()
    for layer, ids in enumerate(routing):
        (hits,) = cache_access_hits(ids[None], E, slots=3, replay="token", cold="miss")
        assert [step.layers[layer].hits for step in statistics.steps] == hits[0].sum(dim=-1).tolist()


def test_a_fixed_set_reads_each_of_its_experts_once_and_the_others_always(olmoe):
    ids = token_ids(1, 30)
    usage = [torch.arange(E), torch.arange(E).flip(0)]
    offloaded = OffloadedExperts(olmoe, slots=3, policy="fixed", usage=usage, record=True)
    with offloaded as model:
        assert torch.equal(read_by_token(model, ids, prompt=1), read_by_token(in_memory(olmoe), ids, prompt=1))
        statistics, routing = offloaded.statistics(), offloaded.routing()
        assert offloaded.resident_mask(0).nonzero().flatten().tolist() == [5, 6, 7]
    for layer, seen in enumerate(routing):
        within = usage[layer][seen] >= E - 3
        assert statistics.layers[layer].hits == within.sum() - len(seen[within].unique())


def test_hits_of_a_cache_that_layers_share_are_those_of_the_simulator(olmoe):
    offloaded = OffloadedExperts(olmoe, slots=3, spread="shared", record=True)
    with offloaded as model:
        read_by_token(model, token_ids(1, 30), prompt=1)
        statistics, routing = offloaded.statistics(), offloaded.routing()
    visits = torch.stack([routing[0], routing[1] + E], dim=1).flatten(0, 1)  # layer after layer of each token
    hits = functional.cache_hit_rate(visits[None], 2 * E, cold="miss")[2 * 3 - 1] * visits.numel()
    assert statistics.hits == round(hits.item())
    assert statistics.slots == [6]


def test_prefill_reads_no_expert_twice_and_leaves_the_residents_of_a_token_by_token_pass(olmoe):
    ids = token_ids(1, 30)
    at_once, by_token = (OffloadedExperts(olmoe, slots=3, record=True) for _ in range(2))
    with at_once as model:
        logits(model, ids)
        prefill, routing = at_once.statistics(), at_once.routing()
        masks = [at_once.resident_mask(layer) for layer in range(2)]
    with by_token as model:
        read_by_token(model, ids, prompt=1)
        assert all(torch.equal(mask, by_token.resident_mask(layer)) for layer, mask in enumerate(masks))
    assert [layer.misses for layer in prefill.layers] == [len(seen.unique()) for seen in routing]
    assert prefill.hits == 0


def test_residents_stay_from_call_to_call_until_reset(olmoe):
    offloaded = OffloadedExperts(olmoe, slots=E)
    ids = token_ids(1, 12)
    with offloaded as model:
        logits(model, ids)
        offloaded.forget()
        logits(model, ids)
        assert offloaded.statistics().misses == 0
        offloaded.reset()
        logits(model, ids)
        assert offloaded.statistics().misses > 0


def test_bytes_are_misses_times_the_bytes_of_an_expert(olmoe):
    offloaded = OffloadedExperts(olmoe)
    with offloaded as model:
        read_by_token(model, token_ids(1, 20), prompt=4)
        statistics = offloaded.statistics()
    assert statistics.bytes_read == statistics.misses * 3 * 32 * 16 * 4
    assert sum(step.bytes_read for step in statistics.steps) == statistics.bytes_read
    assert sum(layer.misses for step in statistics.steps for layer in step.layers) == statistics.misses
    assert statistics.to_dict()["steps"][0]["tokens"] == 4


def test_a_failed_read_is_one_error_and_the_engine_goes_on_afterwards(olmoe, monkeypatch):
    from consistency_reg.offload.reading import FileReader

    ids = token_ids(1, 10)
    expected = logits(in_memory(olmoe), ids)
    with OffloadedExperts(olmoe) as model:
        with monkeypatch.context() as patch:

            def fail(self, destination, offset):
                raise OSError("the disk is gone")

            patch.setattr(FileReader, "read_into", fail)
            with pytest.raises(OSError, match="the disk is gone"):
                logits(model, ids)
        assert torch.equal(logits(model, ids), expected)


def test_an_interrupted_wait_leaves_no_read_under_way(olmoe, monkeypatch):
    from consistency_reg.offload import stores

    ids = token_ids(1, 10)
    expected = logits(in_memory(olmoe), ids)
    with OffloadedExperts(olmoe) as model:
        with monkeypatch.context() as patch:
            waited, wait = [], stores.wait

            def interrupted(jobs):
                waited.append(jobs)
                if len(waited) == 1:
                    raise KeyboardInterrupt
                return wait(jobs)

            patch.setattr(stores, "wait", interrupted)
            with pytest.raises(KeyboardInterrupt):
                logits(model, ids)
            assert all(job.done() for jobs in waited for job in jobs)
        assert torch.equal(logits(model, ids), expected)


@pytest.mark.parametrize("store", ["disk", "host"])
def test_a_model_whose_attaching_fails_keeps_its_experts(olmoe, store, monkeypatch):
    model = in_memory(olmoe)
    ids = token_ids(1, 6)
    expected = logits(model, ids)

    def fail(module):
        raise ImportError("no such kernel")

    monkeypatch.setattr("consistency_reg.offload.engine.kernel_of", fail)
    with pytest.raises(ImportError, match="no such kernel"):
        OffloadedExperts(model, store=store).attach()
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(logits(model, ids), expected)


def test_a_file_that_changes_is_named(olmoe):
    with OffloadedExperts(olmoe) as model:
        for file in Path(olmoe).glob("*.safetensors"):
            with file.open("ab") as grown:
                grown.write(b"x")
        with pytest.raises(OSError, match=r"safetensors has changed since it was opened"):
            logits(model, token_ids(1, 4))


def test_several_models_at_once_do_not_mix(tmp_path):
    folders = [save(tmp_path / str(seed), "olmoe") for seed in range(2)]
    other = tiny_model("olmoe", seed=7)
    other.save_pretrained(tmp_path / "other")
    ids = token_ids(1, 8)
    with OffloadedExperts(folders[0]) as one, OffloadedExperts(tmp_path / "other") as two:
        a, b, again = logits(one, ids), logits(two, ids), logits(one, ids)
    assert torch.equal(a, again)
    assert not torch.equal(a, b)


@pytest.mark.parametrize("slots", [2, 3, 4])
def test_the_bias_of_cache_aware_routing_is_for_the_experts_that_are_in_slots(olmoe, slots):
    """Its hits, counted by the cache that it simulates, are the engine's, token by token, behind a prompt too."""
    ids, prompt = token_ids(1, 40), 6
    offloaded = OffloadedExperts(olmoe, slots=slots, best_last=True)
    with offloaded as model, CacheAwareRouting(model, slots / K, strength=0.5) as routing, torch.no_grad():
        output = model(ids[:, :prompt], use_cache=True)
        before = routing.hits
        for t in range(prompt, ids.shape[1]):
            output = model(ids[:, t : t + 1], past_key_values=output.past_key_values, use_cache=True)
        assert offloaded.statistics().decode.hits == routing.hits - before


def test_a_calibration_tells_the_slower_disk_from_the_one_that_is_there(olmoe):
    limit = 50 * 3 * 32 * 16 * 4
    offloaded = OffloadedExperts(olmoe, read_bandwidth=f"{limit}/s")
    with offloaded:
        found = calibrate(offloaded, token_ids(1, 4), reads=10, passes=1)
        assert found.bandwidth <= 1.05 * limit
        assert found.native_bandwidth > found.bandwidth
        with offloaded.reads_unhindered():
            pass
        began = time.perf_counter()
        offloaded.fetch(0, 0, offloaded.empty_rows(0))()
        assert time.perf_counter() - began >= 0.02


@pytest.mark.parametrize("policy", ["lru", "lfu", "fixed"])
def test_computing_is_calibrated_without_reads_whatever_the_policy_keeps(olmoe, policy):
    usage = [torch.arange(E)] * 2 if policy == "fixed" else None
    offloaded = OffloadedExperts(olmoe, slots=K, policy=policy, usage=usage, read_bandwidth=50 * 3 * 32 * 16 * 4)
    with offloaded:
        found = calibrate(offloaded, token_ids(1, 30), reads=1, passes=3)
    assert found.compute_seconds < 0.02  # of one read


def test_reads_can_be_held_back_to_those_of_a_slower_disk(olmoe):
    ids = token_ids(1, 30)
    expert_bytes = 3 * 32 * 16 * 4
    offloaded = OffloadedExperts(olmoe, read_bandwidth=100 * expert_bytes)
    with offloaded as model:
        began = time.perf_counter()
        logits(model, ids)
        elapsed = time.perf_counter() - began
        assert elapsed >= 0.95 * offloaded.statistics().misses / 100
    with pytest.raises(ValueError, match="read_bandwidth must be a positive number of bytes"):
        OffloadedExperts(olmoe, read_bandwidth="slow")
