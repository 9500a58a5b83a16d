"""What cannot work says so in one sentence, before anything is loaded where that can be known."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from offloading import in_memory, logits, read_by_token, save
from safetensors.torch import load_file, save_file
from tiny_models import COMMON, E, K, token_ids

from consistency_reg import CacheAwareRouting, OffloadedExperts
from consistency_reg.offload.checkpoint import read_header


@pytest.fixture
def olmoe(tmp_path):
    return save(tmp_path / "olmoe", "olmoe")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots": K - 1}, f"slots must be at least {K}, the experts that are active per token, got {K - 1}"),
        ({"cache_ratio": 0.5}, f"slots must be at least {K}"),
        ({"cache_ratio": 0}, "cache_ratio must be a positive number"),
        ({"slots": 4, "memory": "1GB"}, "slots and memory are two budgets"),
        ({"memory": "lots"}, "memory must be a positive number of bytes such as 500MB"),
        ({"memory": "1kB"}, r"memory must be at least [\d.]+ kB for this model, got 1 kB: .* for 2 slots a layer"),
        ({"slots": 2.5}, "slots must be whole numbers of experts, got 2.5"),
        ({"slots": [4, "4"]}, "slots must be whole numbers of experts, got '4'"),
        ({"slots": [4]}, "slots must be one number or one for each of 2 layers, got 1"),
        ({"policy": "belady"}, r"policy must be one of \('lru', 'lfu', 'fixed'\), got 'belady'"),
        ({"policy": "fixed", "usage": [torch.ones(E)]}, r"usage must be \[E\] for .* = \[8, 8\], got shapes \[\[8\]\]"),
        ({"policy": "fixed"}, "policy='fixed' goes with the usage of every layer's experts"),
        ({"reads": "fast"}, "reads must be one of direct, buffered, got 'fast'"),
        ({"store": "cloud"}, "store must be one of disk, host, got 'cloud'"),
        ({"spread": "some"}, "spread must be one of equal, shared, auto, got 'some'"),
        ({"spread": "auto"}, "goes with the measured curves"),
        ({"spread": "auto", "curves": [[1, 2]]}, r"curves must hold the hits of 1 to E slots .* got lengths \[2\]"),
        ({"dtype": "int8"}, "dtype must be one of auto, float32, bfloat16, float16, got 'int8'"),
        ({"threads": 0}, "threads must be a positive integer, got 0"),
        ({"read_ahead": 0}, "read_ahead must be a positive integer, got 0"),
        ({"device": "cuda:7"}, r"device cuda:7 is not there: torch finds \d+ CUDA devices"),
        ({"device": "meta"}, "device must be cpu or a CUDA device, got meta"),
    ],
)
def test_options_that_cannot_be(olmoe, options, message):
    with pytest.raises(ValueError, match=message):
        OffloadedExperts(olmoe, **options)


def test_the_memory_that_the_message_names_is_enough(olmoe):
    with pytest.raises(ValueError, match="memory must be at least") as caught:
        OffloadedExperts(olmoe, memory=1)
    needed = float(str(caught.value).split("at least ")[1].split(" kB")[0])
    assert OffloadedExperts(olmoe, memory=f"{needed * 1.01}kB").slots == [K, K]
    assert OffloadedExperts(olmoe, memory="1GB").slots == [E, E]


@pytest.mark.parametrize("ratio", [1.3, 1.75, 2.25, 2.8])
def test_a_ratio_between_two_numbers_of_slots_means_those_of_cache_aware_routing(olmoe, ratio):
    model, ids = in_memory(olmoe), token_ids(1, 40)
    offloaded = OffloadedExperts(olmoe, ratio, best_last=True)
    with CacheAwareRouting(model, ratio, strength=0.5) as routing:
        read_by_token(model, ids, prompt=1)
    with offloaded as read, CacheAwareRouting(read, ratio, strength=0.5):
        read_by_token(read, ids, prompt=1)
        assert offloaded.statistics().hits == routing.hits


def test_curves_give_slots_where_hits_are(olmoe):
    flat, steep = [1.0] * E, [float(size) for size in range(1, E + 1)]
    assert OffloadedExperts(olmoe, slots=4, spread="auto", curves=[flat, steep]).slots == [K, 2 * 4 - K]


def test_an_architecture_whose_experts_do_not_go_through_the_interface_is_named(tmp_path):
    config = transformers.Llama4TextConfig(
        **COMMON | {"intermediate_size": 16}, intermediate_size_mlp=16, num_local_experts=4, head_dim=16
    )
    transformers.Llama4ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"Llama4ForCausalLM has no experts that go through .*Llama4TextExperts"):
        OffloadedExperts(tmp_path)


def test_a_dense_model_is_named(tmp_path):
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**COMMON)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no experts"):
        OffloadedExperts(tmp_path)


def test_quantized_weights_are_refused(olmoe):
    config = Path(olmoe, "config.json")
    plain = config.read_text()
    config.write_text(json.dumps(json.loads(plain) | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ValueError, match=r"is quantized \(fp8\): quantized experts are not computed here"):
        OffloadedExperts(olmoe)
    config.write_text(plain)
    change(olmoe, "experts.0.up_proj", lambda tensor: tensor.to(torch.int8))
    with pytest.raises(ValueError, match=r"is stored as torch.int8: quantized experts are not computed"):
        OffloadedExperts(olmoe)


def test_a_lacking_expert_is_named(olmoe):
    change(olmoe, "layers.1.mlp.experts.5.up_proj", lambda tensor: None)
    with pytest.raises(ValueError, match=r"layers.1.mlp.experts.gate_up_proj needs 8 experts, .* 7 x .*up_proj"):
        OffloadedExperts(olmoe)


def test_a_lacking_weight_that_is_no_expert_is_named(olmoe):
    change(olmoe, "model.norm.weight", lambda tensor: None)
    with pytest.raises(ValueError, match=r"lacks 1 of the model's weights, such as model.norm.weight"):
        OffloadedExperts(olmoe).attach()


def test_a_truncated_file_is_named(olmoe):
    file = max(Path(olmoe).glob("*.safetensors"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{file.name} is truncated"):
        OffloadedExperts(olmoe)
    file.write_bytes(b"1234")
    with pytest.raises(ValueError, match=rf"{file.name} is truncated or no safetensors file"):
        OffloadedExperts(olmoe)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("[1]", "is no safetensors file: its header is a list"),
        ("{1}", "is no safetensors file: its header is not JSON"),
        ('{"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 20]}}', "is damaged: a of 24 bytes would lie in"),
        ('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}', "is damaged: a of 8 bytes would lie in"),
        ('{"a": {"dtype": "F31", "shape": [2], "data_offsets": [0, 8]}}', "a is of the unknown dtype F31"),
    ],
)
def test_a_header_that_cannot_be_is_named(tmp_path, header, message):
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(24))
    with pytest.raises(ValueError, match=message):
        read_header(file)


def test_places_without_a_model(tmp_path, olmoe):
    with pytest.raises(FileNotFoundError, match=r"must be a folder with config.json"):
        OffloadedExperts(tmp_path)
    with pytest.raises(OSError, match="no model can be read from 'nobody/nothing'"):
        OffloadedExperts("nobody/nothing")
    next(Path(olmoe).glob("*.safetensors")).unlink()
    with pytest.raises(FileNotFoundError, match=r"names .* which is not there"):
        OffloadedExperts(olmoe)
    Path(olmoe, "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"must hold model.safetensors or .* has neither"):
        OffloadedExperts(olmoe)


def test_the_index_of_an_earlier_save_in_several_files_is_not_followed(olmoe):
    """As for transformers: saving again in one file removes the former files, but not their index."""
    in_memory(olmoe).save_pretrained(olmoe)
    assert Path(olmoe, "model.safetensors.index.json").exists()
    with OffloadedExperts(olmoe) as model:
        assert torch.equal(logits(model, token_ids(1, 4)), logits(in_memory(olmoe), token_ids(1, 4)))


def test_a_model_of_no_folder_says_where_its_experts_could_be(olmoe):
    config = transformers.OlmoeConfig(**COMMON, num_experts=E, num_experts_per_tok=K)
    model = transformers.OlmoeForCausalLM(config)
    with pytest.raises(ValueError, match="loaded from no folder: save it and give that, or use store='host'"):
        OffloadedExperts(model)


def test_it_is_attached_once(olmoe):
    offloaded = OffloadedExperts(olmoe)
    with offloaded, pytest.raises(RuntimeError, match="offloaded already"):
        offloaded.attach()
    offloaded.detach()


def test_routing_that_was_not_recorded(olmoe):
    offloaded = OffloadedExperts(olmoe)
    with offloaded, pytest.raises(RuntimeError, match="record=True"):
        offloaded.routing()


def change(folder, name, how):
    """Change the tensors with a part of a name in a checkpoint, or drop them."""
    for file in Path(folder).glob("*.safetensors"):
        tensors = load_file(file)
        changed = {key: how(tensor) if name in key else tensor for key, tensor in tensors.items()}
        save_file({key: tensor for key, tensor in changed.items() if tensor is not None}, file)
