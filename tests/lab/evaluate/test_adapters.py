"""Adapter folders of PEFT as models to judge."""

import json
import shutil
import sys

import pytest
import torch
import transformers
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from tokenizers import Tokenizer, models

from consistency_reg.lab.checkpoint import model_folder
from consistency_reg.lab.evaluate.models import load

CPU = torch.device("cpu")
IDS = torch.arange(3, 23)[None]


def save_adapter(model, config, folder):
    """Save an adapter whose updates are not 0; what its model predicts with it."""
    torch.manual_seed(1)
    wrapped = get_peft_model(model, config).eval()
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    wrapped.save_pretrained(folder)
    with torch.no_grad():
        return wrapped(input_ids=IDS, use_cache=False).logits


@pytest.fixture
def base(tmp_path):
    tiny_model("olmoe").save_pretrained(tmp_path / "base")
    words = Tokenizer(models.WordLevel({"<pad>": 0, "word": 1}, unk_token="<pad>"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def reload(base):
    return transformers.AutoModelForCausalLM.from_pretrained(base).eval()


@pytest.mark.parametrize(
    "targets", [{"target_modules": ["q_proj"]}, {"target_parameters": ["mlp.experts.gate_up_proj"]}]
)
def test_an_adapter_is_merged_into_the_base_that_it_names(base, tmp_path, targets):
    config = LoraConfig(r=2, **{"target_modules": [], **targets})
    expected = save_adapter(reload(base), config, tmp_path / "tuned")
    found = load(str(tmp_path / "tuned"), device=CPU)
    assert (found.name, type(found.model).__name__, found.predicts) == ("tuned", "OlmoeForCausalLM", True)
    with torch.no_grad():
        logits = found.model(IDS, use_cache=False).logits
        assert not torch.allclose(logits, reload(base)(IDS, use_cache=False).logits, atol=1e-3)
    assert torch.allclose(logits, expected, atol=1e-4)


def test_a_base_is_found_next_to_the_adapter(base, tmp_path):
    save_adapter(reload(base), LoraConfig(r=2, target_modules=["q_proj"]), tmp_path / "tuned")
    change(tmp_path / "tuned", base_model_name_or_path="../base")
    assert load(str(tmp_path / "tuned"), device=CPU).name == "tuned"


def test_the_tokenizer_may_be_next_to_the_adapter_alone(base, tmp_path):
    save_adapter(reload(base), LoraConfig(r=2, target_modules=["q_proj"]), tmp_path / "tuned")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.move(base / name, tmp_path / "tuned" / name)
    assert load(str(tmp_path / "tuned"), device=CPU).tokenizer.get_vocab() == {"<pad>": 0, "word": 1}


def change(folder, **values):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | values))


def no_base_named(folder, base):
    change(folder, base_model_name_or_path=None)


def base_gone(folder, base):
    shutil.rmtree(base)


def base_that_is_no_model(folder, base):
    change(folder, base_model_name_or_path="somebody/gone")


def weights_lacking(folder, base):
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({n: t for n, t in weights.items() if ".layers.0." not in n}, folder / "adapter_model.safetensors")


def other_shape(folder, base):
    change(folder, r=3)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_base_named, "tuned is a PEFT adapter that names no base"),
        (base_gone, "tuned is a PEFT adapter of .*base, which is not there"),
        (base_that_is_no_model, "tuned is a PEFT adapter of 'somebody/gone', which cannot be read"),
        (weights_lacking, "tuned is a PEFT adapter that does not fit its base: .*missing adapter keys"),
        (other_shape, "tuned is a PEFT adapter that does not fit its base"),
    ],
)
def test_an_adapter_that_cannot_be_used_is_one_clear_line(base, tmp_path, damage, message):
    save_adapter(reload(base), LoraConfig(r=2, target_modules=["q_proj"]), tmp_path / "tuned")
    damage(tmp_path / "tuned", base)
    with pytest.raises((ValueError, OSError), match=message) as caught:
        load(str(tmp_path / "tuned"), device=CPU)
    assert "\n" not in str(caught.value)


def test_virtual_tokens_cannot_be_merged(base, tmp_path):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    save_adapter(reload(base), config, tmp_path / "tuned")
    with pytest.raises(ValueError, match="of kind PROMPT_TUNING, which adds tokens"):
        load(str(tmp_path / "tuned"), device=CPU)


def test_peft_is_named_where_it_is_missing(base, tmp_path, monkeypatch):
    save_adapter(reload(base), LoraConfig(r=2, target_modules=["q_proj"]), tmp_path / "tuned")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'consistency-reg\[peft\]'"):
        load(str(tmp_path / "tuned"), device=CPU)


def test_a_command_that_needs_a_whole_model_says_what_the_folder_is(base, tmp_path):
    save_adapter(reload(base), LoraConfig(r=2, target_modules=["q_proj"]), tmp_path / "tuned")
    with pytest.raises(ValueError, match="holds a PEFT adapter alone: merge it into its base"):
        model_folder(tmp_path / "tuned")
