"""``consistency-reg cloze`` on a dense model and on the mixture that it became."""

import csv
import json

import pytest
import torch
from datasets import Dataset
from dense_models import text
from transformers import LlamaConfig, LlamaForCausalLM

from consistency_reg.lab.cli import main
from consistency_reg.lab.corpus.sources import Text
from consistency_reg.lab.corpus.tokens import train_tokenizer
from consistency_reg.lab.upcycle.convert import Plan, mlp_inputs, upcycle

SMALL = ["--domains", "math", "speeches", "--corpus-bytes", "60000", "--items", "10"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A dense model, and a mixture that uses 2 of its 4 experts, with one tokenizer."""
    root = tmp_path_factory.mktemp("models")
    documents = Dataset.from_dict({"text": ["experts on small devices " * 50]})
    tokenizer = train_tokenizer({"words": Text(documents, documents, "words")}, 300, cache_dir=root)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    dense = LlamaForCausalLM(LlamaConfig(vocab_size=512, initializer_range=0.2, **sizes)).eval()
    plan = Plan(splits=4, top_k=2, router_scale=0.5)
    mixture = upcycle(dense, plan, mlp_inputs(dense, list(text()), [0, 1]))
    for name, model in (("dense", dense), ("mixture", mixture)):
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


@pytest.fixture(autouse=True)
def cache(folders, monkeypatch):
    monkeypatch.setenv("CONSISTENCY_REG_CACHE", str(folders / "cache"))


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_models_answer_the_same_questions_and_their_rows_are_added(folders, tmp_path, capsys):
    path = tmp_path / "cloze.csv"
    dense, mixture = str(folders / "dense"), str(folders / "mixture")
    assert main(["cloze", dense, *SMALL, "--csv", str(path)]) == 0
    assert main(["cloze", dense, mixture, *SMALL, "--cache-ratio", "1", "--csv", str(path)]) == 0
    first, again, other = rows_of(path)
    measured = [name for name in first if name.startswith("cloze/accuracy")]
    assert measured == ["cloze/accuracy", "cloze/accuracy/math", "cloze/accuracy/speeches"]
    assert [first[name] for name in measured] == [again[name] for name in measured]
    halves = [float(other[f"cloze/accuracy/{domain}"]) for domain in ("math", "speeches")]
    assert float(other["cloze/accuracy"]) == pytest.approx(sum(halves) / 2)
    assert (again["difference"], again["items"], other["model"]) == ("0.0", "20", "mixture")
    change = float(other["cloze/accuracy"]) - float(first["cloze/accuracy"])
    assert float(other["difference"]) == pytest.approx(change)
    assert float(other["standard_error"]) > 0
    assert other["command"].startswith(f"consistency-reg cloze {dense} {mixture} --domains math")
    assert json.loads(other["versions"])["torch"]
    assert "cloze accuracy (%)" in capsys.readouterr().out


def test_a_mixture_is_asked_with_cache_aware_routing_too(folders, tmp_path):
    path = tmp_path / "new" / "cloze.csv"
    given = [str(folders / "mixture"), *SMALL, "--cache-aware", "0,5", "--cache-ratio", "1", "--csv", str(path)]
    assert main(["cloze", *given]) == 0
    as_it_is, biased = rows_of(path)
    assert (as_it_is["strength"], as_it_is["cache_ratio"]) == ("0.0", "")
    assert (biased["strength"], biased["cache_ratio"]) == ("5.0", "1.0")
    assert float(biased["difference_standard_error"]) > 0  # other experts, other answers


def test_rows_cannot_be_added_to_a_folder(folders, tmp_path, capsys):
    assert main(["cloze", str(folders / "dense"), *SMALL, "--csv", str(tmp_path)]) == 1
    assert f"--csv must be a file such as {tmp_path / 'cloze.csv'}, got the folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--items", "0"], "--items must be at least 1, got 0"),
        (["--cache-aware", "-1"], "--cache-aware must be strengths of 0 or more, got [-1.0]"),
        (["--cache-ratio", "0.5"], "--cache-ratio must be at least 1, got 0.5"),
        (["--items", "100000"], "domain 'math': documents must hold 100000 passages of 16 tokens"),
        (["--passage", "5000"], "dense reads 2048 tokens, but a question has 5004"),
        (["--cache-aware", "0.1"], "model must contain mixture-of-experts routers"),
    ],
)
def test_what_cannot_be_asked_is_said(options, said, folders, capsys):
    assert main(["cloze", str(folders / "dense"), *SMALL, *options]) == 1
    assert said in capsys.readouterr().err
