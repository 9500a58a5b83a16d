"""Distillation: the dense model's own logits, the divergence, and a recovery through ``consistency-reg fit``."""

import json

import pytest
import torch
from datasets import Dataset
from dense_models import llama, text, turned
from places import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from consistency_reg.lab import train as fit
from consistency_reg.lab.corpus.sources import Text
from consistency_reg.lab.corpus.tokens import train_tokenizer
from consistency_reg.lab.pretrained import trainable
from consistency_reg.lab.upcycle.convert import Plan, mlp_inputs, upcycle
from consistency_reg.lab.upcycle.distillation import Distillation
from consistency_reg.lab.upcycle.teacher import DenseTail, divergence

PLAN = Plan(splits=4, top_k=2, layers=(1,))


def first_inputs(model, ids):
    """What layer 1 is given."""
    heard = {}

    def hear(layer, args, kwargs):
        heard["hidden"], heard["context"] = args[0], kwargs

    hook = model.model.layers[1].register_forward_pre_hook(hear, with_kwargs=True)
    model(ids)
    hook.remove()
    return heard["hidden"], heard["context"]


@torch.no_grad()
def test_the_tail_gives_the_dense_models_logits():
    dense = llama()
    model = trainable(turned(dense, PLAN), "experts")
    wanted = dense(text()).logits
    tail = DenseTail(dense, model)
    hidden, context = first_inputs(model, text())
    assert tail.first == 1
    torch.testing.assert_close(tail.logits(hidden, **context), wanted, rtol=1e-4, atol=1e-4)


def test_another_dense_model_is_refused():
    model = trainable(turned(llama(), PLAN), "experts")
    torch.manual_seed(1)
    other = LlamaForCausalLM(llama().config)
    with pytest.raises(ValueError, match="dense must be the model that the mixture was made from"):
        DenseTail(other, model)


def test_what_learns_besides_the_blocks_is_refused():
    with pytest.raises(ValueError, match="nothing but the experts and routers may learn"):
        DenseTail(llama(), trainable(turned(llama(), PLAN), "all"))


def test_a_dense_model_is_no_mixture():
    with pytest.raises(ValueError, match="must have a layer with experts"):
        DenseTail(llama(), llama())


def test_the_divergence_is_torchs_of_the_predicted_tokens():
    torch.manual_seed(0)
    dense, own = torch.randn(2, 7, 11) * 3, torch.randn(2, 7, 11) * 3
    labels = torch.randint(11, (2, 7))
    labels[:, 4] = -100
    every = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=dense), torch.distributions.Categorical(logits=own)
    )
    wanted = every[:, :-1][labels[:, 1:] != -100]
    torch.testing.assert_close(divergence(dense, own, labels), wanted)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A dense model with a tokenizer, and the mixture that it became."""
    monkeypatch.setenv("CONSISTENCY_REG_CACHE", str(tmp_path / "corpus"))
    documents = Dataset.from_dict({"text": ["experts on small devices " * 50]})
    tokenizer = train_tokenizer({"words": Text(documents, documents, "words")}, 300, cache_dir=tmp_path)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    dense = LlamaForCausalLM(LlamaConfig(vocab_size=512, initializer_range=0.2, **sizes)).eval()
    mixture = upcycle(dense, PLAN, mlp_inputs(dense, list(text()), [1]))
    for name, model in (("dense", dense), ("mixture", mixture)):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    return tmp_path


def recover(folders, name, recipes=("upcycle",), mixture="mixture", **changes):
    options = {
        "data.domains": "[math, cpp]",
        "data.corpus_bytes": 60_000,
        "data.sequence_length": 64,
        "data.batch_size": 8,
        "data.validation_tokens": 256,
        "model.warmup_steps": 1,
        "model.learning_rate": 0.001,
        "trainer.max_steps": 24,
        "trainer.precision": "32-true",
        "trainer.accelerator": "cpu",
        "trainer.log_every_n_steps": 1,
        "trainer.enable_progress_bar": False,
        "trainer.callbacks.init_args.dense": folders / "dense",
        "wandb_project": "",
    } | changes
    arguments = [f"--config={ROOT / 'recipes' / recipe}.yaml" for recipe in recipes]
    arguments += ["--model", str(folders / mixture)]
    arguments += [f"--{key}={value}" for key, value in options.items()]
    assert fit.main([*arguments, "--run_dir", str(folders / name)]) == 0
    return json.loads((folders / name / "result.json").read_text())


def test_the_mixture_comes_nearer_to_the_dense_model_and_only_its_blocks_change(folders):
    alone = {"trainer.callbacks.init_args.weight": 1e4, "model.balance_weight": 0, "model.z_weight": 0}
    result = recover(folders, "run", **alone)  # the dense model is random: the next token would lead away from it
    before, after = result["before"], result["metrics"]
    assert after["val/dense/kl"] < before["val/dense/kl"]
    assert after["val/dense/ppl"] == pytest.approx(before["val/dense/ppl"])
    assert {"val/dense/ppl/math", "val/dense/kl/cpp", "val/ppl/math"} <= after.keys()
    old, new = (AutoModelForCausalLM.from_pretrained(folders / place) for place in ("mixture", "run/model"))
    changed = {name for name, weights in new.state_dict().items() if not torch.equal(weights, old.state_dict()[name])}
    assert changed == {f"model.layers.1.mlp.{name}" for name in CHANGED}


CHANGED = ("gate.weight", "experts.gate_up_proj", "experts.down_proj")


def test_weight_0_measures_without_distilling(folders):
    result = recover(folders, "run", **{"trainer.callbacks.init_args.weight": 0.0, "trainer.max_steps": 2})
    assert result["metrics"]["val/dense/kl"] > 0
    assert "train/distillation" not in (folders / "run" / "metrics.csv").read_text()


def test_the_dense_models_perplexity_is_its_own(folders):
    result = recover(folders, "run", **{"trainer.max_steps": 2})
    turned_back = recover(folders, "same", **{"trainer.max_steps": 2, "model.learning_rate": 0.0})
    assert turned_back["metrics"]["val/dense/ppl"] == pytest.approx(result["metrics"]["val/dense/ppl"])
    assert turned_back["metrics"]["val/dense/kl"] == pytest.approx(result["before"]["val/dense/kl"], rel=1e-4)


@pytest.fixture
def whole(folders):
    """Return the folders, with the dense model as a mixture of one expert next to the others."""
    dense = AutoModelForCausalLM.from_pretrained(folders / "dense").eval()
    one = Plan(splits=1, top_k=1, layers=(1,), router_scale=0.0)
    upcycle(dense, one, mlp_inputs(dense, list(text()), [1])).save_pretrained(folders / "whole")
    AutoTokenizer.from_pretrained(folders / "dense").save_pretrained(folders / "whole")
    return folders


DENSE = {"recipes": ("upcycle", "upcycle_dense"), "mixture": "whole"}


def test_the_baseline_is_the_dense_model_whose_mlps_of_the_same_layers_learn_the_next_token(whole):
    result = recover(whole, "run", **DENSE, **{"trainer.max_steps": 3})
    before, after = result["before"], result["metrics"]
    for domain in ("/math", "/cpp", ""):
        assert before[f"val/ppl{domain}"] == pytest.approx(before[f"val/dense/ppl{domain}"], rel=1e-5)
    assert after["val/ppl"] < before["val/ppl"] == pytest.approx(after["val/dense/ppl"], rel=1e-5)
    old, new = (AutoModelForCausalLM.from_pretrained(whole / place).state_dict() for place in ("whole", "run/model"))
    changed = {name.rpartition(".")[2] for name, weights in new.items() if not torch.equal(weights, old[name])}
    assert changed == {"gate_up_proj", "down_proj"}
    neither = {"model.balance_weight": 0, "model.z_weight": 0}
    alone = recover(whole, "alone", **DENSE, **{"trainer.max_steps": 3}, **neither)
    assert alone["metrics"]["val/ppl"] == after["val/ppl"]


@pytest.mark.parametrize("key", ["consistency.weight", "routing.strength"])
def test_a_term_is_refused_where_the_router_has_no_choice(whole, key):
    with pytest.raises(ValueError, match=rf"{key} must be 0 for .* tokens use all of its experts \(1 of 1\), got 0.3"):
        recover(whole, "run", **DENSE, **{key: 0.3})
    assert not (whole / "run").exists()


def test_a_dense_checkpoint_is_told_how_to_become_a_mixture(folders):
    with pytest.raises(ValueError, match=r"It looks dense\. `consistency-reg upcycle .*dense` makes a mixture of it"):
        recover(folders, "run", mixture="dense")


def test_impossible_weights_are_named():
    with pytest.raises(ValueError, match=r"weight must be a finite number >= 0, got -0\.5"):
        Distillation(weight=-0.5)
