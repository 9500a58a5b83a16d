"""What a user's own module shows in wandb, TensorBoard and CSV with a RoutingMonitor, read back from their files."""

import csv
import json
import sys
from pathlib import Path

import pytest
import torch
import wandb
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from toy_lightning import Validated, layer_ids, loader, regularizer, tokens, validated
from wandb_file import read_run

from consistency_reg import RoutingMonitor, functional
from consistency_reg.callbacks.progress import TrainingBar
from consistency_reg.callbacks.trainer_state import total_steps
from consistency_reg.lab.workspace import workspace
from consistency_reg.masks import count_tokens
from consistency_reg.tracking.figures import Sample, cache_curve, pixels, routing_heatmap

TRAIN, PROSE, CODE = tokens(16), tokens(6, seed=3), tokens(5, seed=4) // 4
BATCHES, STEPS = 4, 8  # of an epoch; of two


class Mine(Validated):
    """A module that a user may have: its validation loss over two dataloaders, logged at the epoch's end."""

    def on_validation_start(self):
        self.losses = []

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        (ids,) = batch
        self.losses.append(nn.functional.cross_entropy(self(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()))

    def on_validation_epoch_end(self):
        self.log("val/loss", torch.stack(self.losses).mean())


class Letters:
    def decode(self, ids):
        return chr(97 + ids[0])


def trainer(loggers, *callbacks, **options):
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"max_epochs": 2, "log_every_n_steps": 1, "val_check_interval": 2} | quiet | options
    return Trainer(accelerator="cpu", logger=loggers, callbacks=list(callbacks), num_sanity_val_steps=1, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two epochs of four steps, a validation after every second, in three loggers."""
    folder = tmp_path_factory.mktemp("tracked")
    three_loggers = [
        WandbLogger(project="mine", save_dir=folder),
        CSVLogger(folder, name="csv", version=""),
        TensorBoardLogger(folder, name="tensorboard", version=""),
    ]
    monitor = RoutingMonitor(segment_lengths=(3, 8), tokenizer=Letters())
    run = trainer(three_loggers, regularizer(), monitor)
    run.fit(validated(Mine), loader(TRAIN), [loader(PROSE), loader(CODE)])
    wandb.finish()
    return folder


@pytest.fixture(scope="module")
def run(folder):
    return read_run(folder)


def test_wandb_rows_are_complete_and_in_order_by_the_trainers_step_and_by_tokens(run):
    assert run.axes["*"] == "trainer/global_step"
    assert "trainer/tokens" in run.axes
    assert [row["_step"] for row in run.history] == list(range(len(run.history)))
    steps = [row["trainer/global_step"] for row in run.history]
    assert steps == sorted(steps)
    training = [row for row in run.history if "train/ce" in row]
    assert [row["trainer/global_step"] for row in training] == list(range(STEPS))
    assert [row["trainer/tokens"] for row in training] == [4 * 24 * (step + 1) for step in range(STEPS)]
    validations = [row for row in run.history if "val/srp/m3" in row]
    assert [row["trainer/global_step"] for row in validations] == [1, 3, 5, 7]
    assert [row["trainer/tokens"] for row in validations] == [192, 384, 576, 768]


def test_names_are_grouped_with_layers_and_domains_below(run):
    (*_, validation) = (row for row in run.history if "val/srp/m3" in row)
    for name in ("srp/m3", "rho_hat/m8", "cache/lru_2k", "balance/cv", "balance/local_cv/m8", "overlap", "static_srp"):
        assert {f"val/{name}", f"val/{name}/0", f"val/{name}/1"} <= validation.keys(), name
    for name in ("srp/m3", "cache/lru_25pct", "balance/min_share", "overlap"):
        assert {f"val/{name}/layer_00", f"val/{name}/layer_01"} <= validation.keys(), name
    (*_, step) = (row for row in run.history if "train/ce" in row)
    for name in ("loss", "weight", "weighted", "layer_00", "layer_01"):
        assert f"train/consistency/{name}" in step
    assert {"train/srp/m3", "train/static_srp", "train/local_gain/m8", "train/cache/lru_2k"} <= step.keys()


def test_the_measures_of_a_training_batch_are_those_of_its_routing(run):
    ids = layer_ids(validated(Mine), TRAIN[:4])  # the first step, before the first update; the loader does not shuffle
    first = next(row for row in run.history if "train/srp/m3" in row)
    assert first["train/srp/m3"] == pytest.approx(float(functional.srp(ids, 6, 3).srp))
    lru = torch.stack([functional.cache_hit_rate(layer, 6, policy="lru") for layer in ids]).mean(dim=0)
    assert first["train/cache/lru_2k"] == pytest.approx(float(lru[3]))


def test_csv_and_tensorboard_show_the_same_scalars(folder, run):
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    with (folder / "csv" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = {name for row in run.history for name, value in row.items() if isinstance(value, float | int)}
    names -= {"_step", "_timestamp", "_runtime", "trainer/global_step", "epoch"}
    assert {"train/srp/m3", "val/srp/m8/1", "tradeoff/misses_25pct", "trainer/tokens"} <= names
    for name in names:
        in_wandb = [(row["trainer/global_step"], row[name]) for row in run.history if name in row]
        in_csv = [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]
        in_tensorboard = [(event.step, event.value) for event in events.Scalars(name)]
        shown = [(step, pytest.approx(value, rel=1e-6)) for step, value in in_wandb]
        assert in_csv == shown, name
        assert in_tensorboard == shown, name
    assert {"val/routing/0", "val/routing/1", "val/cache/curve"} <= set(events.Tags()["images"])


def test_the_table_of_experts_says_what_each_is_for(run):
    table = run.table("val/experts")
    assert table["columns"] == ["layer", "expert", "usage", "SRP m8", "domain", "share"]
    rows = table["data"]
    assert [(layer, expert) for layer, expert, *_ in rows] == [(i, e) for i in range(2) for e in range(6)]
    for layer in range(2):
        assert sum(usage for i, _, usage, *_ in rows if i == layer) == pytest.approx(6)
    ids = {name: layer_ids(validated(Mine), text) for name, text in (("0", PROSE), ("1", CODE))}
    first = json.loads(next(iter(sorted(run.folder.glob("files/media/table/val/experts_*")))).read_text())["data"]
    for layer, expert, _, _, domain, share in first:
        of_tokens = {name: float((layers[layer] == expert).any(-1).double().mean()) for name, layers in ids.items()}
        if of_tokens["0"] != pytest.approx(of_tokens["1"], rel=0.2):  # the first validation comes after two updates
            assert domain == max(of_tokens, key=of_tokens.get)
            assert share == pytest.approx(max(of_tokens.values()) / sum(of_tokens.values()), abs=0.1)


def test_every_validation_draws_the_same_texts_and_the_cache_curve(run):
    for key in ("val/routing/0", "val/routing/1", "val/cache/curve"):
        pictures = [Image.open(path) for path in run.images(key)]
        assert len(pictures) == 4
        assert len({picture.size for picture in pictures}) == 1
    rows = run.table("val/cache/hit_rates")["data"]
    (marked,) = (row for row in rows if row[2] == "2K")
    (*_, validation) = (row for row in run.history if "val/cache/lru_2k" in row)
    assert marked[:2] == [2.0, pytest.approx(validation["val/cache/lru_2k"])]
    assert [ratio for ratio, _, _ in rows] == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
    assert rows[-1][1] == 1.0


def test_the_summary_has_the_last_values_and_the_best_validation_as_a_whole(run):
    validations = [row for row in run.history if "val/loss" in row]
    best = min(validations, key=lambda row: row["val/loss"])
    assert run.summary["val/loss"] == validations[-1]["val/loss"]
    for name in (
        "val/loss",
        "val/srp/m3",
        "val/cache/lru_2k",
        "val/balance/cv",
        "trainer/global_step",
        "trainer/tokens",
    ):
        assert run.summary[f"best/{name}"] == pytest.approx(best[name])
    for row, point in zip(validations, (row for row in run.history if "tradeoff/loss" in row), strict=True):
        assert point["tradeoff/loss"] == row["val/loss"]
        assert point["tradeoff/srp_m8"] == pytest.approx(row["val/srp/m8"])
        assert point["tradeoff/misses_25pct"] == pytest.approx(1 - row["val/cache/lru_25pct"])


def test_wandb_disabled_tracks_nothing_and_trains(tmp_path):
    disabled = WandbLogger(project="mine", save_dir=tmp_path, mode="disabled")
    run = trainer([disabled], RoutingMonitor((3,)), max_epochs=1)
    run.fit(validated(Mine), loader(TRAIN), [loader(PROSE), loader(CODE)])
    wandb.finish()
    assert not list(tmp_path.rglob("*.wandb"))


def test_without_matplotlib_there_are_numbers_and_a_warning(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "consistency_reg.tracking.pictures", None)
    run = trainer([TensorBoardLogger(tmp_path)], RoutingMonitor((3,)), max_epochs=1)
    with pytest.warns(UserWarning, match="draws no pictures"):
        run.fit(validated(Mine), loader(TRAIN), [loader(PROSE)])
    assert "val/srp/m3" in run.callback_metrics


def test_a_validation_that_shuffles_is_told(tmp_path):
    run = trainer([TensorBoardLogger(tmp_path)], RoutingMonitor((3,)), max_epochs=1)
    shuffled = torch.utils.data.DataLoader(loader(PROSE).dataset, batch_size=4, shuffle=True)
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="first row of a validation dataloader changes"):
        run.fit(validated(Mine), loader(TRAIN), [shuffled])


def test_a_quality_that_is_not_logged_is_refused(tmp_path):
    with pytest.raises(ValueError, match="quality must be a metric that the module logs in validation, got 'val/bleu'"):
        trainer(False, RoutingMonitor((3,), quality="val/bleu")).fit(validated(Mine), loader(TRAIN), [loader(PROSE)])
    with pytest.raises(ValueError, match="samples must be at least 0 texts, got -1"):
        RoutingMonitor(samples=-1)


def test_training_batches_can_be_left_alone_and_accumulation_measures_the_last(tmp_path):
    for options, expected in (({"training": False}, 0), ({}, 2)):
        logger = CSVLogger(tmp_path, name=f"{expected}")
        accumulated = trainer([logger], RoutingMonitor((3,), **options), max_epochs=1, accumulate_grad_batches=2)
        accumulated.fit(validated(Mine), loader(TRAIN))
        rows = list(csv.DictReader(Path(logger.log_dir, "metrics.csv").read_text().splitlines()))
        assert len([row for row in rows if row.get("train/srp/m3")]) == expected
        assert [row["trainer/tokens"] for row in rows] == ["192.0", "384.0"]


def test_tokens_and_the_best_validation_survive_a_checkpoint(tmp_path):
    monitor = RoutingMonitor((3,))
    run = trainer(False, monitor, max_epochs=1)
    run.fit(validated(Mine), loader(TRAIN), [loader(PROSE)])
    run.save_checkpoint(tmp_path / "last.ckpt")
    resumed = RoutingMonitor((3,))
    trainer(False, resumed).fit(validated(Mine), loader(TRAIN), [loader(PROSE)], ckpt_path=tmp_path / "last.ckpt")
    assert monitor.tokens == BATCHES * 4 * 24
    assert resumed.tokens == 2 * monitor.tokens
    assert resumed.tradeoff.best["best/val/loss"] <= monitor.tradeoff.best["best/val/loss"]


def test_padding_is_not_counted_as_tokens_seen():
    ids = torch.ones(2, 5, dtype=torch.int64)
    valid = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    assert int(count_tokens({"input_ids": ids, "attention_mask": valid})) == 7
    assert int(count_tokens({"input_ids": ids}, lambda _: (valid.bool(), None))) == 7
    assert count_tokens({"input_ids": ids}) == count_tokens([ids]) == count_tokens(ids) == 10
    assert count_tokens({"pixels": torch.rand(2, 5)}) == 0


def test_the_bar_shows_the_time_that_remains_and_how_good_the_model_is(capsys):
    bar, monitor = TrainingBar(interval=0), RoutingMonitor((3,))
    run = trainer(False, monitor, bar, enable_progress_bar=True, max_steps=6)
    run.fit(validated(Mine), loader(TRAIN), [loader(PROSE)])
    shown = bar.get_metrics(run, run.lightning_module)
    assert float(shown["perplexity"]) == pytest.approx(30, abs=15)
    assert {shown["SRP"], shown["misses"]} == {f"{100 * value:.1f}%" for value in monitor.current.values()}
    assert total_steps(run) == 6
    assert "6/6" in capsys.readouterr().out


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_pictures_of_any_model(layers):
    ids = [torch.rand(12, 40).topk(3).indices for _ in range(layers)]
    names = [f"layer_{i:02d}" for i in range(layers)]
    sample = Sample("code", ids, [40] * layers, names, torch.tensor([0] * 5 + [7] * 7), ["$x^2$", "\n", "漢", ""] * 3)
    assert pixels(routing_heatmap(sample)).ndim == 3


def test_the_workspace_is_laid_out_over_names_that_runs_log(run):
    view = workspace("team", "project", quality="val/loss", segment_length=8)
    assert [section.name for section in view.sections] == ["Trade-off", "Consistency", "Caches", "Balance", "Training"]
    logged = {name for row in run.history for name in row}
    for section in view.sections:
        for panel in section.panels:
            y = panel.y if hasattr(panel, "y") else panel.media_keys
            axes = [*(y if isinstance(y, list) else [y]), *([panel.x] if hasattr(panel, "x") else [])]
            assert {getattr(axis, "name", axis) for axis in axes} <= logged, panel.title
    assert "summary:val/loss" in view._to_model().model_dump_json(by_alias=True)


def test_the_cache_curve_marks_2k_and_the_share_once_where_they_are_one(run):
    from consistency_reg.metrics import CacheHitRate
    from consistency_reg.routing import RoutingTrace

    def marks(num_experts, shares):
        trace = RoutingTrace([torch.rand(2, 9, num_experts).topk(2).indices], num_experts=num_experts)
        metric = CacheHitRate.from_trace(trace, "lru")
        metric.update(trace)
        return [text.get_text().split(":")[0] for text in cache_curve(metric.results(), shares).axes[0].texts]

    assert marks(16, (0.25,)) == ["2K, 25% of the experts"]
    assert marks(12, (0.5,)) == ["2K", "50% of the experts"]
