"""A target or a budget in real Lightning runs: what moves the weight, what is logged, resumed, reported and refused."""

import csv
import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from parameters import parameters
from places import ROOT
from torch import nn
from torch.utils.data import DataLoader
from toy_lightning import ToyTopKRouter

from consistency_reg import (
    ConsistencyRegularizer,
    LoadBalanceLoss,
    LocalConsistencyLoss,
    RouterCapture,
    RoutingMonitor,
    SegmentRoutingPerformance,
)
from consistency_reg.lab import train as recipe
from consistency_reg.lab.model import small_moe
from consistency_reg.lab.module import CausalMoE

V, T, M = 64, 32, 8
QUICKSTART = ROOT / "recipes" / "quickstart.yaml"


def rows(count, seed=0):
    """Each row is on a topic that a tenth of its tokens belong to."""
    generator = torch.Generator().manual_seed(seed)
    topic = torch.randint(8, (count, 1), generator=generator)
    of_topic = topic * 8 + torch.randint(8, (count, T), generator=generator)
    of_any = torch.randint(V, (count, T), generator=generator)
    return torch.where(torch.rand(count, T, generator=generator) < 0.1, of_topic, of_any)


def loader(count, seed=0):
    return DataLoader([{"input_ids": row, "labels": row} for row in rows(count, seed)], batch_size=8)


def regularizer(**options):
    loss = LocalConsistencyLoss((4, M))
    return ConsistencyRegularizer(loss, **({"weight": 0.3} | options))


def train(steps, callbacks, folder=None, *, batches=150, validation=False, checkpoint=None, **options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "expert_size": 8, "num_experts": 8, "top_k": 2}
    model = small_moe(vocab_size=V, context_length=T, **sizes)
    balance = LoadBalanceLoss(running=0.95)
    module = CausalMoE(model, balance, learning_rate=1e-2, warmup_steps=10)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=callbacks,
        logger=False if folder is None else CSVLogger(folder, name="", version=""),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, loader(8 * batches), loader(16, seed=1) if validation else None, ckpt_path=checkpoint)
    return module, trainer


def column(folder, name):
    """Step -> value."""
    with Path(folder, "metrics.csv").open() as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row.get(name)}


class Pulled(LightningModule):
    """A router over a token's and its document's embedding that is pulled back to where it began: what it gives up for
    consistency is a question of the term's weight alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.token, self.topic = (nn.Embedding(V, 8).requires_grad_(False) for _ in range(2))
        self.router = ToyTopKRouter(16, 8, bias=False)
        self.start = self.router.weight.detach().clone()

    def forward(self, tokens):
        topic = self.topic(tokens[:, :1]).expand(-1, tokens.shape[1], -1)
        return self.router(torch.cat([self.token(tokens), topic], dim=-1))

    def training_step(self, tokens, _):
        self(tokens)
        return 0.04 * (self.router.weight - self.start).square().sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


@pytest.mark.parametrize("target", [0.72, 0.8])  # 0.67 without the term
def test_a_target_is_reached_and_held(target, tmp_path):
    module, term = Pulled(), regularizer(target={f"srp/m{M}": target}, start_step=20, response_steps=20)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=150,
        callbacks=[term],
        logger=CSVLogger(tmp_path, name="", version=""),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(rows(16 * 150), batch_size=16))
    with torch.no_grad(), RouterCapture(module) as capture:
        module(rows(512, seed=1))
    metric = SegmentRoutingPerformance.from_trace(capture.trace(), [M])
    metric.update(capture.trace())
    assert float(metric.compute()[f"srp_m{M}"]) == pytest.approx(target, abs=0.02)

    weights = column(tmp_path, "train/consistency/weight")
    assert all(weight == 0 for step, weight in weights.items() if step < 20)
    assert all(0 <= weight <= 0.9 for weight in weights.values())
    settled = [weights[step] for step in range(100, 150)]
    assert max(settled) < 1.5 * min(settled)
    measured, violation = (column(tmp_path, f"train/consistency/{name}") for name in ("measured", "violation"))
    assert min(measured) == 20
    assert measured[149] == pytest.approx(target, abs=0.02)
    assert violation[149] == pytest.approx(target - measured[149], abs=1e-6)
    assert all(value == pytest.approx(target) for value in column(tmp_path, "train/consistency/target").values())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_quickstart_recipe_reaches_a_target_at_validation(tmp_path):
    goal = ["--consistency.target", "{srp/m16: 0.65}", "--consistency.response_steps", "30"]
    options = ["--wandb_project", "", "--trainer.enable_progress_bar", "false", "--run_dir", str(tmp_path / "run")]
    assert recipe.main(["--config", str(QUICKSTART), *goal, *options]) == 0
    metrics = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]
    assert metrics["val/srp/m16"] == pytest.approx(0.65, abs=0.03)  # 0.59 at the recipe's weight, 0.48 without the term
    assert metrics["val/balance/min_share"] > 0.1


def test_a_budget_compares_each_step_with_the_same_step_of_the_reference(tmp_path):
    train(60, [regularizer(weight=0.0)], tmp_path / "base")
    term = regularizer(budget={"ce": 0.01}, reference=str(tmp_path / "base"), start_step=20, response_steps=10)
    _, trainer = train(60, [term], tmp_path / "run")
    increase = column(tmp_path / "run", "train/consistency/measured")
    assert min(increase) == 21, "what step 20 cost is known after it"
    assert increase[21] == 0, "at the step at which the term begins the runs are still one"
    weights = column(tmp_path / "run", "train/consistency/weight")
    assert weights[20] == pytest.approx(0.3)
    assert weights[21] > 0.3, "nothing of the budget is spent"
    assert all(weight <= 0.9 for weight in weights.values())
    base, run = (column(tmp_path / name, "train/ce") for name in ("base", "run"))
    assert run[21] != base[21]
    assert trainer.callback_metrics["train/consistency/target"] == pytest.approx(0.01)


def test_a_measure_of_validation_moves_the_weight_when_it_is_logged(tmp_path):
    term = regularizer(target={f"val/srp/m{M}": 0.9}, response_steps=10)
    monitor = RoutingMonitor(segment_lengths=[M])
    train(30, [term, monitor], tmp_path, validation=True, val_check_interval=10, num_sanity_val_steps=1)
    seen = column(tmp_path, f"val/srp/m{M}")
    weights = column(tmp_path, "train/consistency/weight")
    assert len({weights[step] for step in range(10)}) == 1
    assert len({weights[step] for step in range(10, 20)}) == 1
    assert weights[0] == pytest.approx(0.3)
    assert weights[10] > 0.3
    measured = column(tmp_path, "train/consistency/measured")
    assert min(measured) == 10
    assert measured[10] == pytest.approx(seen[9], abs=1e-5)


def test_a_target_that_cannot_be_met_is_reported_once_and_the_weight_stays_bounded(tmp_path):
    def term():
        return regularizer(target={f"srp/m{M}": 0.99}, max_weight=0.3, response_steps=5)

    with pytest.warns(UserWarning, match=r"target srp/m8=0\.99 is not reached: it is 0\.\d+ after \d+ steps") as first:
        _, trainer = train(30, [term()], tmp_path)
    said = [warning for warning in first if "is not reached" in str(warning.message)]
    assert len(said) == 1
    assert "at max_weight=0.3" in str(said[0].message)
    assert all(weight == pytest.approx(0.3) for weight in column(tmp_path, "train/consistency/weight").values())

    trainer.save_checkpoint(tmp_path / "half.ckpt")
    with pytest.warns() as second:
        train(60, [term()], checkpoint=tmp_path / "half.ckpt")
    assert not [warning for warning in second if "is not reached" in str(warning.message)]


def test_a_resumed_run_has_the_weights_of_one_that_was_not_stopped(tmp_path):
    def term():
        return regularizer(target={f"srp/m{M}": 0.8}, response_steps=10)

    straight, _ = train(20, [term()], tmp_path / "straight", batches=1)  # an epoch is one step: stop at its end
    _, trainer = train(20, [term()], batches=1, max_epochs=10)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = train(20, [term()], tmp_path / "resumed", batches=1, checkpoint=tmp_path / "half.ckpt")
    weights = [column(tmp_path / name, "train/consistency/weight") for name in ("straight", "resumed")]
    assert weights[1] == {step: weight for step, weight in weights[0].items() if step >= 10}
    assert torch.equal(parameters(straight), parameters(resumed))


def test_a_second_run_with_the_same_callback_begins_anew(tmp_path):
    term = regularizer(target={f"srp/m{M}": 0.8}, response_steps=10)
    for name in ("first", "second"):
        train(20, [term], tmp_path / name)
    first, second = (column(tmp_path / name, "train/consistency/weight") for name in ("first", "second"))
    assert first == second


def test_a_goal_that_is_never_measured_is_said():
    with pytest.warns(UserWarning, match="val/srp/m8 was not measured once from step 0 on, so the weight stayed"):
        train(12, [regularizer(target={"val/srp/m8": 0.8})])
    with pytest.warns(UserWarning, match="srp/m33 was not measured once"):
        train(12, [regularizer(target={"srp/m33": 0.8})])


def test_a_measure_that_nobody_logs_and_a_reference_that_does_not_exist_are_refused(tmp_path):
    with pytest.raises(RuntimeError, match=r"follow val/srp/m16, which must be logged, got .*val/ce"):
        train(12, [regularizer(target={"val/srp/m16": 0.8})], validation=True, val_check_interval=6)
    with pytest.raises(FileNotFoundError, match=r"no run: it has no metrics\.csv"):
        train(12, [regularizer(budget={"ce": 0.01}, reference=str(tmp_path))])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": 0.0, "target": {"srp/m16": 0.7}}, r"weight must be > 0 with a target or a budget"),
        ({"max_weight": 0.1, "target": {"srp/m16": 0.7}}, r"max_weight must be .* at least weight=0\.3, got 0\.1"),
        ({"response_steps": 0, "target": {"srp/m16": 0.7}}, r"response_steps must be at least 1, got 0"),
        ({"max_weight": 1.0}, "max_weight and response_steps need a target or a budget"),
        ({"response_steps": 50}, "max_weight and response_steps need a target or a budget"),
        ({"target": {"srp/m16": 0.7}, "budget": {"ce": 0.01}, "reference": "x"}, "either a target or a budget"),
        ({"budget": {"ce": 0.01}}, "give both"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        regularizer(**options)


def test_a_recipe_may_have_a_goal():
    recipe.check_config(["--config", str(QUICKSTART), "--consistency.target", "{srp/m16: 0.7}"])
    budget = ["--consistency.budget", "{ce: 0.005}", "--consistency.reference", "runs/baseline"]
    recipe.check_config(["--config", str(QUICKSTART), *budget, "--consistency.max_weight", "0.5"])
    with pytest.raises(ValueError, match="target must name srp/m16"):
        recipe.check_config(["--config", str(QUICKSTART), "--consistency.target", "{spr/m16: 0.7}"])
    with pytest.raises(ValueError, match="target"):
        recipe.check_config(["--config", str(QUICKSTART), "--consistency.target", "{srp/m16: high}"])
