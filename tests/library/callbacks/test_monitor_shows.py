"""RoutingMonitor in real Lightning runs: the trade-off of several loaders, alarms, early stopping, the run's config."""

import warnings

import pytest
import torch
import wandb
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from torch import nn
from toy_lightning import ToyTopKRouter, Validated, loader, regularizer, tokens, validated
from wandb_file import read_run

from consistency_reg import ConsistencyRegularizer, LocalConsistencyLoss, RoutingMonitor
from consistency_reg.tracking.alarms import Alarms

TRAIN, PROSE, CODE = tokens(16), tokens(6, seed=3), tokens(12, seed=4)


class ByLoader(Validated):
    """Logs its validation loss in ``validation_step``, as most modules do: one metric for each dataloader."""

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        (ids,) = batch
        loss = nn.functional.cross_entropy(self(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        self.log("val_loss", loss, batch_size=len(ids))


def trainer(loggers, *callbacks, **options):
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"max_epochs": 1, "log_every_n_steps": 1, "num_sanity_val_steps": 0} | quiet | options
    return Trainer(accelerator="cpu", logger=loggers, callbacks=list(callbacks), **options)


class StuckTopKRouter(ToyTopKRouter):
    """Uses two experts for everything."""

    def forward(self, x):
        logits = nn.functional.linear(x, self.weight)
        logits = logits + 100 * (torch.arange(logits.shape[-1]) < 2)
        weights, ids = logits.softmax(-1).topk(2)
        return logits, weights, ids


def collapsed():
    module = validated()
    module.routers[0] = StuckTopKRouter(8, 6, bias=False)
    return module


def test_several_loaders_have_one_quality_weighted_by_their_tokens(tmp_path):
    monitor, csv = RoutingMonitor((3,)), CSVLogger(tmp_path)
    run = trainer([csv], monitor)
    run.fit(validated(ByLoader), loader(TRAIN), [loader(PROSE), loader(CODE)])
    first, second = (float(run.callback_metrics[f"val_loss/dataloader_idx_{i}"]) for i in range(2))
    assert monitor.tradeoff.best["best/val_loss"] == pytest.approx((6 * first + 12 * second) / 18)
    header = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"tradeoff/val_loss", "tradeoff/srp_m3", "tradeoff/misses_25pct"} <= set(header)


def test_another_training_with_the_same_callback_begins_anew():
    both, alone = RoutingMonitor((3,)), RoutingMonitor((3,))
    trainer(False, both, max_epochs=3).fit(validated(ByLoader), loader(TRAIN), loader(PROSE))
    trainer(False, both).fit(validated(ByLoader), loader(TRAIN), loader(CODE))
    trainer(False, alone).fit(validated(ByLoader), loader(TRAIN), loader(CODE))
    assert both.tokens == alone.tokens
    assert both.tradeoff.best == alone.tradeoff.best


def test_a_module_without_a_quality_is_told_once():
    class Silent(Validated):
        def validation_step(self, batch, batch_idx):
            self(batch[0][:, :-1])

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(False, RoutingMonitor((3,)), max_epochs=2).fit(validated(Silent), loader(TRAIN), loader(PROSE))
    assert len([one for one in caught if "no quality is logged in validation" in str(one.message)]) == 1


def test_a_collapsed_router_is_warned_of_once_and_alerts_in_wandb(tmp_path):
    logger = WandbLogger(project="mine", save_dir=tmp_path)
    run = trainer([logger], RoutingMonitor((3,), alarms=Alarms(max_cv=None)), max_epochs=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(collapsed(), loader(TRAIN), loader(PROSE))
    wandb.finish()
    told = [str(one.message) for one in caught if "used less than 0.1 of its fair share" in str(one.message)]
    assert len(told) == 1
    assert "in layer 0" in told[0]
    assert read_run(tmp_path).alerts == ["an expert is used less than 0.1 of its fair share"]


def test_a_term_without_gradient_is_told_at_the_next_validation():
    class Detached(LocalConsistencyLoss):
        def per_layer(self, trace):
            return super().per_layer(trace) * 0

    options = {"max_epochs": 1}
    monitor = RoutingMonitor((3,), alarms=Alarms(None, None))
    with pytest.warns(UserWarning, match="the consistency term has no gradient"):
        trainer(False, ConsistencyRegularizer(Detached((2,)), 0.1), monitor, **options).fit(
            validated(), loader(TRAIN), loader(PROSE)
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*consistency term.*gradient")
        trainer(False, regularizer(), RoutingMonitor((3,)), **options).fit(validated(), loader(TRAIN), loader(PROSE))


def test_the_loss_of_a_step_is_the_same_whether_the_term_is_watched():
    losses = []
    for callbacks in ([regularizer()], [regularizer(), RoutingMonitor((3,))]):
        module = validated()
        trainer(False, *callbacks).fit(module, loader(TRAIN), loader(PROSE))
        losses.append([parameter.detach().clone() for parameter in module.parameters()])
    for watched, alone in zip(*losses, strict=True):
        torch.testing.assert_close(watched, alone, rtol=0, atol=0)


def test_early_stopping_on_the_smallest_share_as_the_docs_have_it():
    stop = EarlyStopping("val/balance/min_share", mode="max", divergence_threshold=0.1, patience=10**9)
    run = trainer(False, RoutingMonitor((3,)), stop, max_epochs=5)
    run.fit(collapsed(), loader(TRAIN), loader(PROSE))
    assert run.current_epoch == 1
    stop = EarlyStopping("val/balance/min_share", mode="max", divergence_threshold=1e-6, patience=10**9)
    healthy = trainer(False, RoutingMonitor((3,)), stop, max_epochs=2)
    healthy.fit(validated(), loader(TRAIN), loader(PROSE))
    assert healthy.current_epoch == 2


def test_the_settings_of_the_term_are_in_the_config_of_a_users_own_run(tmp_path):
    loggers = [WandbLogger(project="mine", save_dir=tmp_path), CSVLogger(tmp_path, name="csv", version="")]
    term = ConsistencyRegularizer(LocalConsistencyLoss((2, 3), temperature=0.5), weight=0.2, warmup_steps=7)
    trainer(loggers, term, RoutingMonitor((3,))).fit(validated(), loader(TRAIN), loader(PROSE))
    wandb.finish()
    of_wandb = read_run(tmp_path).config["consistency"]
    of_csv = yaml.safe_load((tmp_path / "csv" / "hparams.yaml").read_text())["consistency"]
    for settings in (of_wandb, of_csv):
        assert (settings["weight"], settings["warmup_steps"]) == (0.2, 7)
        assert settings["loss"]["class_path"].endswith("LocalConsistencyLoss")
        assert settings["loss"]["init_args"]["segment_lengths"] == [2, 3]
        assert settings["loss"]["init_args"]["temperature"] == 0.5


def test_settings_that_a_run_has_already_stay(tmp_path):
    logger = WandbLogger(project="mine", save_dir=tmp_path, config={"consistency": {"weight": "of the recipe"}})
    trainer([logger], regularizer()).fit(validated(), loader(TRAIN))
    wandb.finish()
    assert read_run(tmp_path).config["consistency"] == {"weight": "of the recipe"}
