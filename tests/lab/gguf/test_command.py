"""``consistency-reg export``: llama.cpp writes the text that transformers writes, and a bad request leaves no file."""

import errno
import sys
from importlib.util import find_spec

import pytest
import torch
import transformers
from tiny_models import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from consistency_reg.lab import files
from consistency_reg.lab.cli import main
from consistency_reg.lab.model import small_moe

pytestmark = pytest.mark.skipif(find_spec("gguf") is None, reason="gguf is not installed: the extra gguf")
in_llama_cpp = pytest.mark.skipif(find_spec("xllamacpp") is None, reason="xllamacpp is not installed: the extra gguf")

TEXT = "The committee met on Tuesday, and 17 of its members didn't agree with the other 230: café, naïve, x  =  y\n\n"
SPECIAL = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}


def byte_level_tokenizer(steps=(), **special):
    """A byte-level BPE as ``fit`` trains one, or with other steps before the bytes."""
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, bytes_of]) if steps else bytes_of
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    options = {"special_tokens": ["<|endoftext|>", "<|pad|>"], "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator([TEXT * 3], trainers.BpeTrainer(vocab_size=300, **options))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **(special or SPECIAL))


def save(folder, model, tokenizer):
    """Save a model whose weights are large enough for a text that does not repeat one token."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.dim() > 1 else 1).add_(0 if parameter.dim() > 1 else 0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def lab_model(shared_experts):
    sizes = {"hidden_size": 64, "num_layers": 3, "num_heads": 4, "expert_size": 32, "num_experts": 8, "top_k": 3}
    return small_moe(vocab_size=310, shared_experts=shared_experts, **sizes)


def granite(**options):
    """GraniteMoe as IBM makes it: grouped keys, every multiplier in use, a head of its own."""
    sizes = {"vocab_size": 310, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 6, "num_experts_per_tok": 2}
    scales = {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.1}
    config = transformers.GraniteMoeConfig(**sizes, **scales, logits_scaling=2.0, **options)
    return transformers.GraniteMoeForCausalLM(config)


MODELS = {
    "lab": lambda: lab_model(0),
    "lab with a shared expert": lambda: lab_model(1),
    "granite": lambda: granite(tie_word_embeddings=False),
}


@pytest.fixture
def place(tmp_path):
    return save(tmp_path / "tiny", lab_model(0), byte_level_tokenizer())


@in_llama_cpp
@pytest.mark.parametrize("kind", MODELS)
def test_llama_cpp_writes_the_text_of_transformers(kind, tmp_path, capsys):
    torch.manual_seed(0)
    steps = [pre_tokenizers.Digits(individual_digits=True)] if kind == "granite" else []  # as SmolLM's
    place, out = save(tmp_path / "tiny", MODELS[kind](), byte_level_tokenizer(steps)), tmp_path / "out" / "tiny.gguf"
    assert main(["export", place, "--out", str(out), "--check"]) == 0
    shown = capsys.readouterr().out
    assert "write the same 32 of 32 greedy tokens" in shown
    assert [path.name for path in out.parent.iterdir()] == ["tiny.gguf"]


@in_llama_cpp
@pytest.mark.parametrize("steps", [[], [pre_tokenizers.Digits(individual_digits=True)]], ids=["gpt-2", "smollm"])
def test_llama_cpp_cuts_text_as_the_tokenizer_does(steps, tmp_path):
    from consistency_reg.lab.gguf.engine import LlamaCpp

    tokenizer = byte_level_tokenizer(steps)
    place, out = save(tmp_path / "tiny", lab_model(0), tokenizer), tmp_path / "a.gguf"
    assert main(["export", place, "--out", str(out)]) == 0
    engine = LlamaCpp(out)
    hard = [
        "a\r\n\n  b",
        "x²=½ Ⅷ 12345",
        "I'LL we'll 's",
        "中文 日本語 привет",
        "👩‍👩‍👧\u00a0\u2003\u200b",
        "a <|endoftext|> b",
        "   ",
    ]
    for text in [TEXT, *hard]:
        assert engine.token_ids(text) == tokenizer(text)["input_ids"], text


@in_llama_cpp
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_matrices_can_be_rounded(dtype, place, tmp_path):
    from consistency_reg.lab.gguf.engine import LlamaCpp

    whole, rounded = tmp_path / "whole.gguf", tmp_path / "rounded.gguf"
    assert main(["export", place, "--out", str(whole)]) == 0
    assert main(["export", place, "--out", str(rounded), "--dtype", dtype]) == 0
    assert rounded.stat().st_size < 0.7 * whole.stat().st_size
    assert len(LlamaCpp(rounded).greedy(TEXT, 4)) == 4


@in_llama_cpp
def test_a_text_that_is_longer_than_the_context_is_said(place, tmp_path):
    from consistency_reg.lab.gguf.engine import LlamaCpp

    assert main(["export", place, "--out", str(tmp_path / "a.gguf")]) == 0
    engine = LlamaCpp(tmp_path / "a.gguf", context=64)
    assert len(engine.greedy([5] * 40, 24)) == 24
    for prompt in ([5] * 41, "x" * 41):
        with pytest.raises(ValueError, match=r"context must be at least 65 for 41 \+ 24 tokens, got 64"):
            engine.greedy(prompt, 24)


@in_llama_cpp
def test_another_text_is_said_and_is_a_failure(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("consistency_reg.lab.gguf.tensors.rotary_pairs", lambda weights, heads: weights)
    assert main(["export", place, "--out", str(tmp_path / "a.gguf"), "--check"]) == 1
    assert "of 32 greedy tokens" in capsys.readouterr().out


def test_a_bias_that_llama_cpp_lacks_is_named(tmp_path, capsys):
    model = lab_model(0)
    model.config.cache_aware_routing = {"strength": 0.1}
    place = save(tmp_path / "tiny", model, byte_level_tokenizer())
    assert main(["export", place, "--out", str(tmp_path / "a.gguf")]) == 0
    assert "the one of 0.1 is not exported" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "tokenizer", "message"),
    [
        (
            lambda: tiny_model("olmoe"),
            {},
            "only models of granitemoe and granitemoeshared can be exported, got 'olmoe'",
        ),
        (lambda: small_moe(vocab_size=310, hidden_size=32, num_layers=2, dense_layers=[0]), {}, "partly_dense"),
        (lambda: granite(attention_bias=True), {}, "attention_bias must be False"),
        (lambda: granite(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}), {}, "rope_type"),
        (lambda: small_moe(vocab_size=270, hidden_size=32, num_layers=1), {}, "vocab_size must hold"),
        (lambda: lab_model(0), {"pad_token": "<|pad|>"}, "must have an end token"),
        (lambda: lab_model(0), {"steps": [pre_tokenizers.Whitespace()], **SPECIAL}, "only tokenizers that cut text as"),
    ],
)
def test_what_cannot_be_exported_is_named_and_leaves_nothing(model, tokenizer, message, tmp_path, capsys):
    place, out = save(tmp_path / "tiny", model(), byte_level_tokenizer(**tokenizer)), tmp_path / "out"
    assert main(["export", place, "--out", str(out / "a.gguf")]) == 1
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_a_dtype_and_a_place_are_checked(place, tmp_path, capsys):
    assert main(["export", place, "--out", str(tmp_path / "a.gguf"), "--dtype", "int4"]) == 1
    assert "dtype must be one of auto, float32, float16, bfloat16, got 'int4'" in capsys.readouterr().err
    assert main(["export", place, "--out", str(tmp_path)]) == 1
    assert "--out must be a file" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "out"), "--out", str(tmp_path / "a.gguf")]) == 1
    assert not list(tmp_path.glob("*.gguf"))


def test_a_full_disk_leaves_the_former_file(place, tmp_path, capsys, monkeypatch):
    out = tmp_path / "a.gguf"
    out.write_bytes(b"former")
    write, written = files._FirstError.write, []

    def full(self, content):
        written.append(len(content))
        if len(written) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, content)

    monkeypatch.setattr(files._FirstError, "write", full)
    assert main(["export", place, "--out", str(out)]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert out.read_bytes() == b"former"
    assert {path.name for path in tmp_path.iterdir()} == {"a.gguf", "tiny"}


def test_a_missing_package_names_the_extra(place, tmp_path, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("consistency_reg.lab.gguf.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gguf", None)  # as if it were not installed
    assert main(["export", place, "--out", str(tmp_path / "a.gguf")]) == 1
    assert "gguf is not installed: pip install 'consistency-reg[gguf]'" in capsys.readouterr().err
    assert not (tmp_path / "a.gguf").exists()
