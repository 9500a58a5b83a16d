"""RoutingMonitor in real Lightning runs: what it logs is what the metrics say of the validation data."""

import pytest
import torch
from lightning.pytorch import Trainer
from test_regularizer import ToyMoE, regularizer, tokens, toy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from consistency_reg import RouterCapture, RoutingMonitor, functional


class Validated(ToyMoE):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        (ids,) = batch
        self.log("val/ce", nn.functional.cross_entropy(self(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()))


class Domains(Validated):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self(batch[0][:, :-1])


def validated(kind=Validated):
    torch.manual_seed(1)
    return kind()


def loader(ids, batch_size=4):
    return DataLoader(TensorDataset(ids), batch_size=batch_size)


def trainer(callbacks, **options):
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(accelerator="cpu", max_epochs=1, callbacks=callbacks, **quiet, **options)


def layer_ids(module, ids):
    with torch.no_grad(), RouterCapture(module) as capture:
        module(ids[:, :-1])
    return list(capture.trace().expert_ids)


def test_it_logs_the_measures_of_all_validation_data():
    module, ids = validated(), tokens(10, seed=3)
    (logged,) = trainer([RoutingMonitor(segment_lengths=(3, 8))]).validate(module, loader(ids), verbose=False)
    layers = layer_ids(module, ids)
    model = functional.srp(layers, 6, 8)
    assert logged["val/srp/m8"] == pytest.approx(float(model.srp))
    assert logged["val/rho_hat/m8"] == pytest.approx(float(model.size_ratio))
    assert logged["val/static_srp"] == pytest.approx(float(model.static_srp))
    assert logged["val/local_gain/m8"] == pytest.approx(float(model.local_gain))
    assert logged["val/srp/m8/layer_01"] == pytest.approx(float(model.layers[1].srp))
    lru = torch.stack([functional.cache_hit_rate(ids, 6, policy="lru") for ids in layers]).mean(dim=0)
    assert logged["val/cache/lru_k"] == pytest.approx(float(lru[1]))
    assert logged["val/cache/lru_2k"] == pytest.approx(float(lru[3]))
    assert logged["val/cache/lru_25pct"] == pytest.approx(float(lru[round(0.25 * 6) - 1]))
    balance = [functional.usage_balance(functional.usage_counts(ids, 6), torch.tensor(10 * 23)) for ids in layers]
    assert logged["val/balance/cv"] == pytest.approx(sum(float(layer.cv) for layer in balance) / 2)
    assert logged["val/balance/min_share"] == pytest.approx(min(float(layer.min_share) for layer in balance))
    assert logged["val/overlap"] == pytest.approx(sum(float(functional.overlap_rate(ids, 6)) for ids in layers) / 2)


def test_domains_are_measured_apart_and_pooled():
    module, first, second = validated(Domains), tokens(6, seed=4), tokens(5, seed=5)
    results = trainer([RoutingMonitor(segment_lengths=(3,))]).validate(
        module, [loader(first), loader(second)], verbose=False
    )
    logged = {name: value for result in results for name, value in result.items()}
    for name, ids in (("/0", first), ("/1", second), ("", torch.cat([first, second]))):
        expected = float(functional.srp(layer_ids(module, ids), 6, 3).srp)
        assert logged[f"val/srp/m3{name}"] == pytest.approx(expected)


def test_both_callbacks_together_and_the_sanity_check():
    module, monitor = validated(), RoutingMonitor(segment_lengths=(3,))
    run = trainer([regularizer(), monitor], num_sanity_val_steps=2)
    run.fit(module, loader(tokens(8)), loader(tokens(6, seed=3)))
    expected = float(functional.srp(layer_ids(module, tokens(6, seed=3)), 6, 3).srp)
    assert float(run.callback_metrics["val/srp/m3"]) == pytest.approx(expected)
    assert "train/consistency/loss" in run.callback_metrics
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_a_module_without_validation_is_left_alone():
    trainer([RoutingMonitor()]).fit(toy(), loader(tokens(4)))


def test_a_failing_validation_lets_go_of_the_model():
    class Failing(Validated):
        def validation_step(self, batch, batch_idx):
            self(batch[0])
            raise ArithmeticError

    module = validated(Failing)
    with pytest.raises(ArithmeticError):
        trainer([RoutingMonitor(segment_lengths=(3,))]).validate(module, loader(tokens(4)), verbose=False)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
