"""RoutingMonitor in real Lightning runs: what it logs is what the metrics say of the validation data."""

import pytest
import torch
from lightning.pytorch import Trainer
from processes import on_processes
from toy_lightning import Domains, Validated, layer_ids, loader, regularizer, tokens, toy, validated

from consistency_reg import RoutingMonitor, RoutingTrace, functional
from consistency_reg.tracking.accumulate import RoutingMeasures


def trainer(callbacks, **options):
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(accelerator="cpu", max_epochs=1, callbacks=callbacks, **quiet, **options)


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


def test_the_usage_of_experts_in_a_validation_is_told_for_engines_that_pin_some():
    module, ids, callback = validated(Domains), [tokens(6, seed=4), tokens(5, seed=5)], RoutingMonitor((3,))
    trainer([callback]).validate(module, [loader(one) for one in ids], verbose=False)
    counts = [functional.usage_counts(layer, 6) for layer in layer_ids(module, torch.cat(ids))]
    expected = [f"{layer} {e} {count}" for layer, of in enumerate(counts) for e, count in enumerate(of.tolist())]
    assert callback.usage_profile().splitlines() == expected


class Tested(Domains):
    def test_step(self, batch, batch_idx, dataloader_idx):
        return self.validation_step(batch, batch_idx, dataloader_idx)

    def predict_step(self, batch, batch_idx):
        """Do nothing."""


def test_a_test_is_measured_as_a_validation_and_a_prediction_is_not():
    monitor = RoutingMonitor(segment_lengths=(3,))
    module, loaders = validated(Tested), [loader(tokens(6, seed=4)), loader(tokens(5, seed=5))]
    run = trainer([monitor])
    validation = {name: v for of in run.validate(module, loaders, verbose=False) for name, v in of.items()}
    test = {name: value for of in run.test(module, loaders, verbose=False) for name, value in of.items()}
    measured = {name: value for name, value in validation.items() if name.startswith("val/") and "srp" in name}
    assert {"val/srp/m3", "val/srp/m3/1", "val/srp/m3/layer_00"} <= set(measured)
    for name, value in measured.items():
        assert test[f"test/{name[4:]}"] == pytest.approx(value), name
    assert not any(hooked._forward_hooks or hooked._forward_pre_hooks for hooked in module.modules())
    with pytest.warns(UserWarning, match=r"measures nothing in trainer\.predict.*trainer\.test"):
        run.predict(module, loaders[0])


def results_of_a_rank(rank):
    """SRP by domain; ranks see the domains in another order, and one of them the third domain not at all."""
    measures = RoutingMeasures((2,), (1.0,), ())
    steady, restless = torch.zeros(1, 8, 1, dtype=torch.int64), torch.arange(8)[None, :, None] % 2
    for domain, ids in [(0, steady), (1, restless)][:: 1 if rank else -1]:
        measures.add(RoutingTrace([ids], num_experts=4), domain)
        measures.add(RoutingTrace([ids[:, :6]], num_experts=4), domain)  # of another length: counts what waits
    if rank:
        measures.add(RoutingTrace([steady], num_experts=4), 2)
    return {name: float(value) for name, value in measures.results("abc").parts.items() if name.startswith("srp")}


def test_processes_that_see_the_domains_in_another_order_do_not_mix_them(tmp_path):
    first, second = on_processes(2, results_of_a_rank, tmp_path)
    assert first == second
    assert first["srp/m2/a"] == first["srp/m2/c"] == 1
    assert first["srp/m2/b"] == pytest.approx(float(functional.srp([torch.arange(8)[None, :, None] % 2], 4, 2).srp))


def test_a_skipped_training_batch_is_not_measured():
    class Skipping(Validated):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    run = trainer([RoutingMonitor(segment_lengths=(3,))], log_every_n_steps=1)
    run.fit(validated(Skipping), loader(tokens(12)))
    assert "train/srp/m3" in run.callback_metrics


def test_a_validation_batch_without_a_forward_is_left_out_and_a_validation_without_any_is_told():
    class Skipping(Validated):
        skipped = (0,)

        def validation_step(self, batch, batch_idx):
            return None if batch_idx in self.skipped else super().validation_step(batch, batch_idx)

    module, ids = validated(Skipping), tokens(8)
    (logged,) = trainer([RoutingMonitor(segment_lengths=(3,))]).validate(module, loader(ids), verbose=False)
    assert logged["val/srp/m3"] == pytest.approx(float(functional.srp(layer_ids(module, ids[4:]), 6, 3).srp))
    module.skipped = (0, 1)
    with pytest.raises(RuntimeError, match="0 of 2 routers were captured"):
        trainer([RoutingMonitor(segment_lengths=(3,))]).validate(module, loader(ids), verbose=False)


def test_segments_that_no_document_is_long_enough_for_are_not_logged():
    run = trainer([RoutingMonitor(segment_lengths=(3, 16, 64))], log_every_n_steps=1)
    run.fit(validated(), loader(tokens(8)[:, :13]), loader(tokens(6, seed=3)[:, :13]))
    names = set(run.callback_metrics)
    assert {"val/srp/m3", "val/srp/m3/layer_00", "train/srp/m3", "val/local_gain/m3", "val/cache/lru_2k"} <= names
    assert not [name for name in names if {"m16", "m64"} & set(name.split("/"))]


def test_documents_of_some_batches_are_kept_beside_batches_that_are_one_document_a_row():
    ids, documents = torch.randint(4, (2, 12, 1)), torch.arange(12).expand(2, 12) // 5
    for first in (None, documents):
        second = documents if first is None else None
        mixed, told = (RoutingMeasures((3,), (1.0,), ()) for _ in range(2))
        for one in (first, second):
            mixed.add(RoutingTrace([ids], 4, document_ids=one))
            told.add(RoutingTrace([ids], 4, document_ids=torch.zeros_like(documents) if one is None else one))
        assert mixed.results("a").model == told.results("a").model


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_shares": (25,)}, r"cache_shares must be a list of numbers in \(0, 1\], got \(25,\)"),
        ({"cache_shares": 0.5}, "cache_shares must be a list of .* got 0.5"),
        ({"cache_ratios": (1.0, -1)}, r"cache_ratios must be a list of positive numbers, got \(1.0, -1\)"),
    ],
)
def test_caches_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RoutingMonitor(**options)


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
