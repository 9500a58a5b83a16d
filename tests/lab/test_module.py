"""CausalMoE: the loss that it trains on and the perplexity that it reports; and the models that recipes build."""

import math

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModelForCausalLM

from consistency_reg import LoadBalanceLoss, RouterCapture, RouterZLoss
from consistency_reg.lab.model import count_parameters, small_moe
from consistency_reg.lab.module import CausalMoE, next_token_losses

V, T = 64, 24
SIZE = {
    "vocab_size": V,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 2,
    "expert_size": 8,
    "num_experts": 8,
    "top_k": 4,
}


class Rows(Dataset):
    """Rows of two documents each, as the data module packs them."""

    def __init__(self, rows, seed=0):
        self.ids = torch.randint(V, (rows, T), generator=torch.Generator().manual_seed(seed))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, row):
        half = T // 2
        labels = self.ids[row].clone()
        labels[[0, half]] = -100
        return {
            "input_ids": self.ids[row],
            "labels": labels,
            "position_ids": torch.arange(half).repeat(2),
            "document_ids": torch.arange(2).repeat_interleave(half),
            "attention_mask": torch.ones(T, dtype=torch.bool),
        }


def batch(rows=4, seed=0):
    return next(iter(DataLoader(Rows(rows, seed), batch_size=rows)))


def module(**options):
    return CausalMoE(small_moe(**SIZE), **options)


def trainer(**options):
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(accelerator="cpu", **quiet, **options)


def test_a_step_trains_on_cross_entropy_and_the_balance_terms():
    ours, data = module(balance_weight=0.3, z_weight=0.2, warmup_steps=0), batch()
    reference = small_moe(**SIZE)
    with RouterCapture(reference) as capture:
        losses = [
            reference(input_ids=data["input_ids"][:, part], labels=data["labels"][:, part], use_cache=False).loss
            for part in (slice(0, T // 2), slice(T // 2, T))
        ]
    cross_entropy = float(sum(losses)) / 2
    run = trainer(max_steps=1)
    run.fit(ours, DataLoader(Rows(4), batch_size=4))
    assert float(run.callback_metrics["train/ce"]) == pytest.approx(cross_entropy, rel=1e-5)

    fresh = module()
    with RouterCapture(fresh.model) as capture:
        fresh(data)
    trace = capture.trace(data["attention_mask"], data["document_ids"])
    assert float(run.callback_metrics["train/balance"]) == pytest.approx(float(LoadBalanceLoss()(trace)), rel=1e-5)
    assert float(run.callback_metrics["train/z"]) == pytest.approx(float(RouterZLoss()(trace)), rel=1e-5)


@pytest.mark.parametrize("running", [0.0, 0.9])
def test_the_balance_counts_the_micro_batches_of_each_step(running):
    """Ten batches in steps of four: Lightning ends the third step of an epoch after two."""
    balance, pending = LoadBalanceLoss("global", running, accumulation_steps=4), []

    class Steps(Callback):
        def on_train_batch_end(self, trainer, *_):
            pending.append((trainer.global_step, balance.get_extra_state()["calls"]))

    run = trainer(max_epochs=2, max_steps=6, accumulate_grad_batches=4, callbacks=[Steps()], val_check_interval=5)
    run.fit(module(balance=balance, warmup_steps=1), DataLoader(Rows(10), batch_size=1), DataLoader(Rows(1)))
    calls = [1, 2, 3, 0, 1, 2, 3, 0, 1, 0]
    steps = [0, 0, 0, 1, 1, 1, 1, 2, 2, 3]
    assert pending == [*zip(steps, calls, strict=True), *((3 + n, call) for n, call in zip(steps, calls, strict=True))]


def test_perplexity_is_of_all_predicted_tokens_whatever_the_batches():
    ours = module()
    (logged,) = trainer().validate(ours, DataLoader(Rows(5), batch_size=2), verbose=False)
    data = batch(5)
    with torch.no_grad():
        losses = next_token_losses(ours.eval()(data), data["labels"])
    assert losses.numel() == 5 * (T - 2)
    assert logged["val/ce"] == pytest.approx(float(losses.mean()), rel=1e-5)
    assert logged["val/ppl"] == pytest.approx(math.exp(logged["val/ce"]), rel=1e-5)


def test_labels_that_are_all_masked_are_refused():
    with pytest.raises(ValueError, match="labels must hold at least one token to predict"):
        next_token_losses(torch.zeros(1, 4, V), torch.full((1, 4), -100))


def test_a_schedule_needs_its_length():
    with pytest.raises(ValueError, match=r"trainer.max_steps must be more than warmup_steps=40, got -1"):
        trainer(max_epochs=1).fit(module(), DataLoader(Rows(4), batch_size=4))


@pytest.mark.parametrize("option", ["balance_weight", "z_weight", "learning_rate"])
def test_options_must_be_numbers_from_zero(option):
    with pytest.raises(ValueError, match=f"{option} must be a finite number >= 0, got -1"):
        module(**{option: -1.0})


def test_two_models_of_one_seed_share_what_has_the_same_name_and_shape():
    routed, shared = (dict(small_moe(**SIZE, shared_experts=n, seed=3).named_parameters()) for n in (0, 1))
    same = [name for name in routed if name in shared and routed[name].shape == shared[name].shape]
    assert len(same) > 10
    for name in same:
        assert torch.equal(routed[name], shared[name]), name
    other = dict(small_moe(**SIZE, seed=4).named_parameters())
    assert not torch.equal(routed["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


@pytest.mark.parametrize("shared_experts", [0, 1, 2])
def test_shared_experts_take_the_place_of_routed_ones(shared_experts):
    model = small_moe(**SIZE, shared_experts=shared_experts)
    assert model.config.num_local_experts == 8 - shared_experts
    assert model.config.num_experts_per_tok == 4 - shared_experts
    for ours, plain in zip(count_parameters(model), count_parameters(small_moe(**SIZE)), strict=True):
        assert ours == pytest.approx(plain, rel=0.01)


@pytest.mark.parametrize("options", [{"shared_experts": 4}, {"shared_experts": -1}, {"top_k": 9}])
def test_a_router_without_a_choice_is_refused(options):
    with pytest.raises(ValueError, match="must leave the router at least one active expert"):
        small_moe(**(SIZE | options))


def test_dense_layers_have_no_router_and_as_many_parameters():
    routed, partly = small_moe(**SIZE), small_moe(**SIZE, dense_layers=[0])
    router_rows = SIZE["num_experts"] * SIZE["hidden_size"]
    assert count_parameters(partly)[0] == count_parameters(routed)[0] - router_rows
    assert RouterCapture(partly).layer_names == ("model.layers.1.block_sparse_moe.router",)
    same = dict(routed.named_parameters())
    for name, parameter in partly.named_parameters():
        if name in same:
            assert torch.equal(parameter, same[name]), name


def test_a_model_with_dense_and_shared_experts_is_read_back_as_it_was(tmp_path):
    saved = small_moe(**SIZE, dense_layers=[1], shared_experts=1).eval()
    saved.save_pretrained(tmp_path)
    loaded, about = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(about.values()), about
    ids = batch()["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(ids).logits, saved(ids).logits)


@pytest.mark.parametrize("dense_layers", [[2], [-1], [0, 1]])
def test_dense_layers_that_there_are_not_or_that_leave_no_router_are_refused(dense_layers):
    with pytest.raises(ValueError, match=r"dense_layers must be numbers of layers, 0 to 1, and leave at least one"):
        small_moe(**SIZE, dense_layers=dense_layers)


def test_the_head_has_weights_of_its_own_where_embeddings_are_not_tied():
    tied, own = (sum(p.numel() for p in small_moe(**SIZE, tie_embeddings=tie).parameters()) for tie in (True, False))
    assert own - tied == V * SIZE["hidden_size"]
