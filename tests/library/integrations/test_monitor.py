"""RoutingMonitorCallback: what a Trainer's evaluations and logged steps measure, and what reporters get of it."""

import json
import warnings

import datasets
import pytest
import torch
import transformers
from plain_sgd import PLAIN_SGD
from tiny_models import tiny_model, token_ids
from wandb_file import read_run

from consistency_reg import CacheAwareRouting, LocalConsistencyLoss, RouterCapture
from consistency_reg.integrations import ConsistencyCallback, RoutingMonitorCallback
from consistency_reg.rerouting import RoutingSchedule
from consistency_reg.tracking.accumulate import RoutingMeasures
from consistency_reg.tracking.alarms import Alarms
from consistency_reg.tracking.monitor import MonitorCore

T = 12
LENGTHS = (2, 4)
SHOWN = ("srp/m4", "static_srp", "local_gain/m2", "cache/lru_k", "balance/cv", "balance/min_share", "srp/m2/layer_01")


def monitor(**options):
    return RoutingMonitorCallback(LENGTHS, (1.0,), (), **options)


def rows(count, seed=0, *, ragged=True):
    """Rows of tokens, the odd ones padded on the right, as two documents where positions begin again."""
    data = []
    for index, ids in enumerate(token_ids(count, T, seed)):
        mask = torch.arange(T) < (T - 3 if ragged and index % 2 else T)
        data.append({"input_ids": ids, "attention_mask": mask.long(), "labels": ids.where(mask, -100)})
    return data


def packed(count, seed=0):
    positions = torch.cat([torch.arange(7), torch.arange(T - 7)])
    return [{"input_ids": ids, "position_ids": positions, "labels": ids} for ids in token_ids(count, T, seed)]


def by_hand(model, data, batch_size=4):
    """The measures of an evaluation, from traces whose masks come from the data."""
    measures = RoutingMeasures(LENGTHS, (1.0,), ())
    for start in range(0, len(data), batch_size):
        batch = {name: torch.stack([row[name] for row in data[start : start + batch_size]]) for name in data[0]}
        valid = batch["attention_mask"].bool() if "attention_mask" in batch else None
        documents = (batch["position_ids"] == 0).cumsum(1) if "position_ids" in batch else None
        with RouterCapture(model.eval()) as capture, torch.no_grad():
            model(**batch, use_cache=False)
        measures.add(capture.trace(valid, documents))
    measured = measures.results(["all"])
    return {name: float(value) for name, value in (measured.model | measured.parts).items()}


def trainer_of(model, folder, callbacks=(), evaluated=None, train=None, **options):
    options = PLAIN_SGD | {
        "output_dir": str(folder), "per_device_train_batch_size": 2, "per_device_eval_batch_size": 4, "max_steps": 2,
        "gradient_accumulation_steps": 2, "eval_strategy": "no" if evaluated is None else "steps", "eval_steps": 2,
    } | options  # fmt: skip
    trainer = transformers.Trainer(
        model, transformers.TrainingArguments(**options), train_dataset=train or rows(8), eval_dataset=evaluated
    )
    for callback in callbacks:
        callback.add_to(trainer)
    return trainer


def evaluations(trainer):
    return [log for log in trainer.state.log_history if any(name.endswith("_runtime") for name in log)][:-1]


@pytest.mark.parametrize("make", [rows, packed], ids=["padded", "packed"])
def test_an_evaluation_is_measured_as_by_hand(tmp_path, make):
    model = tiny_model("olmoe")
    trainer = trainer_of(model, tmp_path, [monitor()], make(6, seed=1))
    trainer.train()
    (log,) = evaluations(trainer)
    expected = by_hand(model, make(6, seed=1))
    assert set(SHOWN) <= set(expected)
    for name, value in expected.items():
        assert log[f"eval_{name}"] == pytest.approx(value, nan_ok=True), name
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_logged_training_steps_are_measured_on_their_last_micro_batch(tmp_path):
    model, heard = tiny_model("olmoe"), []
    callback = monitor()
    trainer = trainer_of(model, tmp_path, [callback], max_steps=4, logging_steps=2, learning_rate=0.0)
    model.register_forward_pre_hook(lambda _, args, kwargs: heard.append(kwargs) or None, with_kwargs=True)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["step"] for log in logs] == [2, 4]
    for log, given in zip(logs, (heard[3], heard[7]), strict=True):
        with RouterCapture(model) as capture, torch.no_grad():
            model(input_ids=given["input_ids"], attention_mask=given["attention_mask"])
        expected = MonitorCore(LENGTHS, (1.0,), ()).training_step(capture.trace(given["attention_mask"].bool()))
        for name, value in expected.items():
            assert log[name] == pytest.approx(float(value)), name
    assert [log["tokens"] for log in logs] == [sum(int(g["attention_mask"].sum()) for g in heard[:n]) for n in (4, 8)]
    assert callback.tokens == logs[-1]["tokens"]


def test_training_steps_may_be_left_alone(tmp_path):
    trainer = trainer_of(tiny_model("olmoe"), tmp_path, [monitor(training=False)])
    trainer.train()
    assert not any("srp/m4" in log for log in trainer.state.log_history)


def test_datasets_are_measured_apart_and_pooled(tmp_path):
    model, sets = tiny_model("olmoe"), {"math": rows(4, seed=1), "prose": rows(2, seed=2)}
    trainer = trainer_of(model, tmp_path, [monitor()], sets)
    trainer.train()
    first, last = evaluations(trainer)
    assert not any("srp" in name for name in first)
    expected = by_hand(model, sets["math"] + sets["prose"])
    for name, value in expected.items():
        assert last[f"eval_{name}"] == pytest.approx(value), name
    for name, data in sets.items():
        assert last[f"eval_srp/m4/{name}"] == pytest.approx(by_hand(model, data)["srp/m4"])
    profile = trainer.callback_handler.callbacks[0].usage_profile()
    used = 2 * sum(int(row["attention_mask"].sum()) for data in sets.values() for row in data)  # K = 2
    for layer in range(2):
        assert sum(int(line.split()[2]) for line in profile.splitlines() if line.startswith(f"{layer} ")) == used
    quality = (first["eval_math_loss"] * 42 + last["eval_prose_loss"] * 21) / 63
    assert trainer.callback_handler.callbacks[0].core.tradeoff.best["best/eval_loss"] == pytest.approx(quality)


def deployed_by_hand(model, data, routing, batch_size=4):
    """The loss of the rows and the measures of an evaluation with a routing, and how often routers would agree."""
    measures, losses, agreed, uses = RoutingMeasures(LENGTHS, (1.0,), ()), [], 0, 0
    for start in range(0, len(data), batch_size):
        batch = {name: torch.stack([row[name] for row in data[start : start + batch_size]]) for name in data[0]}
        valid = batch["attention_mask"].bool()
        with routing, RouterCapture(model.eval()) as capture, torch.no_grad():
            losses += [float(model(**batch).loss)] * len(valid)
        trace = capture.trace(valid)
        measures.add(trace)
        for layer in trace:
            own = layer.scores.topk(layer.top_k).indices
            same = (layer.expert_ids[..., None] == own[..., None, :]).any(-1)[valid]
            agreed, uses = agreed + int(same.sum()), uses + same.numel()
    values = {name: float(value) for name, value in measures.results(["all"]).model.items()}
    return values | {"loss": sum(losses) / len(losses), "agreement": agreed / uses}


@pytest.mark.parametrize("way", ["deployed=", "the routing of the training"])
def test_an_evaluation_is_measured_once_more_as_the_model_is_deployed(tmp_path, way):
    model, schedule = tiny_model("olmoe"), RoutingSchedule(0.5, ramp_steps=50, cache_ratio=(1, 2))
    callbacks = [monitor(deployed=schedule)]
    if way != "deployed=":
        routed = ConsistencyCallback(LocalConsistencyLoss(LENGTHS), 0.0, routing=schedule)
        callbacks = [monitor(), routed]
    trainer = trainer_of(model, tmp_path, callbacks, rows(6, seed=1))
    trainer.train()
    (log,) = evaluations(trainer)
    expected = deployed_by_hand(model, rows(6, seed=1), CacheAwareRouting(model, 1.5, 0.5))
    expected |= {"strength": 0.5, "cache_ratio": 1.5}
    for name, value in expected.items():
        assert log[f"eval_deployed/{name}"] == pytest.approx(value, rel=1e-5, nan_ok=True), name
    assert log["eval_deployed/cache/lru_k"] > log["eval_cache/lru_k"]
    for name, value in by_hand(model, rows(6, seed=1)).items():  # that of the model as it is, untouched
        assert log[f"eval_{name}"] == pytest.approx(value, nan_ok=True), name


def test_deployed_evaluations_may_be_left_out_and_are_not_there_without_a_routing(tmp_path):
    schedule = RoutingSchedule(0.5)
    routed = ConsistencyCallback(LocalConsistencyLoss(LENGTHS), 0.0, routing=schedule)
    for callbacks in ([monitor()], [monitor(deployed=RoutingSchedule(0.0)), routed]):
        trainer = trainer_of(tiny_model("olmoe"), tmp_path, callbacks, rows(4))
        trainer.train()
        assert not any("deployed" in name for log in trainer.state.log_history for name in log)
    with pytest.raises(TypeError, match="deployed must be a RoutingSchedule"):
        monitor(deployed=0.1)


def test_what_evaluate_returns_has_the_measures_and_outside_of_training_listening_is_needed(tmp_path):
    model, callback = tiny_model("olmoe"), monitor()
    trainer = trainer_of(model, tmp_path, [callback], rows(4))
    with pytest.warns(UserWarning, match=r"measures evaluations within train\(\).*with callback\.listening"):
        assert "eval_srp/m4" not in trainer.evaluate()
    with callback.listening(model):
        assert trainer.evaluate()["eval_srp/m4"] == pytest.approx(by_hand(model, rows(4))["srp/m4"])
        trainer.predict(rows(4, seed=5))  # is not counted
        assert trainer.evaluate()["eval_srp/m4"] == pytest.approx(by_hand(model, rows(4))["srp/m4"])
    assert not any(module._forward_hooks for module in model.modules())


def test_the_term_and_the_monitor_together(tmp_path):
    """The monitor changes nothing of the training."""
    models = tiny_model("olmoe"), tiny_model("olmoe")
    loss = LocalConsistencyLoss((2, 4))
    trainer_of(models[0], tmp_path, [ConsistencyCallback(loss, 5.0)]).train()
    callback = monitor(alarms=Alarms(None, None))
    trainer = trainer_of(models[1], tmp_path, [ConsistencyCallback(loss, 5.0), callback], rows(4))
    trainer.train()
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)
    log = next(log for log in trainer.state.log_history if "loss" in log)
    assert {"consistency/loss", "srp/m4"} <= set(log)


@pytest.mark.parametrize("temperature", [1.0, 1e-9])
def test_a_term_that_does_not_reach_the_routers_is_warned_of(tmp_path, temperature):
    terms = [ConsistencyCallback(LocalConsistencyLoss((2, 4), temperature), 5.0), monitor(alarms=Alarms(None, None))]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer_of(tiny_model("olmoe"), tmp_path, terms, rows(4)).train()
    warned = [str(one.message) for one in told if "the consistency term has no gradient" in str(one.message)]
    assert len(warned) == (temperature < 1)


def test_a_collapsing_router_is_warned_of_once(tmp_path):
    trainer = trainer_of(tiny_model("olmoe"), tmp_path, [monitor(alarms=Alarms(0.99, None))], rows(4), max_steps=4)
    with pytest.warns(UserWarning, match="an expert is used less than 0.99 of its fair share") as told:
        trainer.train()
    assert sum("fair share" in str(one.message) for one in told) == 1


def test_a_resumed_training_goes_on_with_tokens_and_best(tmp_path):
    options = {"evaluated": rows(4), "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    straight = monitor()
    trainer_of(tiny_model("olmoe"), tmp_path, [straight], **options).train()
    checkpoint = tmp_path / "checkpoint-2"
    assert json.loads((checkpoint / "routing_monitor.json").read_text())["tokens"] == straight.tokens // 2
    again = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    resumed = monitor()
    trainer_of(again, tmp_path, [resumed], **options).train(resume_from_checkpoint=str(checkpoint))
    assert resumed.tokens == straight.tokens
    assert resumed.core.tradeoff.best == straight.core.tradeoff.best


def test_another_training_with_the_same_callback_begins_anew(tmp_path):
    options = {"evaluated": rows(4), "max_steps": 2}
    both, alone = monitor(alarms=Alarms(0.99, None)), monitor()
    trainer_of(tiny_model("olmoe"), tmp_path, [both], learning_rate=1.0, **options).train()
    with pytest.warns(UserWarning, match="an expert is used less than 0.99 of its fair share"):
        trainer_of(tiny_model("olmoe", seed=1), tmp_path, [both], **options).train()
    trainer_of(tiny_model("olmoe", seed=1), tmp_path, [alone], **options).train()
    assert both.tokens == alone.tokens
    assert both.core.tradeoff.best == alone.core.tradeoff.best


def test_wandb_has_numbers_tables_pictures_and_the_best(tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    wandb.teardown()  # it reads its environment once in a process
    sets = {"math": rows(4, seed=1), "prose": rows(2, seed=2)}
    trainer = trainer_of(
        tiny_model("olmoe"), tmp_path, [monitor(alarms=Alarms(0.99, None))], sets, report_to=["wandb"], max_steps=4
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    wandb.finish()
    run = read_run(tmp_path)
    rows_of = {name: [row for row in run.history if name in row] for name in ("train/srp/m4", "eval/srp/m4/math")}
    assert [row["train/global_step"] for row in rows_of["train/srp/m4"]] == [1, 2, 3, 4]
    assert [row["train/global_step"] for row in rows_of["eval/srp/m4/math"]] == [2, 4]
    assert len(run.table("eval/experts")["data"]) == 2 * 8
    assert [row[0] for row in run.table("eval/domains")["data"]] == ["math", "prose"]
    for key in ("eval/routing/math", "eval/routing/prose", "eval/cache/curve"):
        assert [image.exists() for image in run.images(key)] == [True, True]
    assert {"best/eval_loss", "best/eval/srp/m4", "best/trainer/global_step"} <= set(_flat(run.summary))
    assert run.alerts == ["an expert is used less than 0.99 of its fair share"]
    assert not any(key.startswith("val/") for row in run.history for key in row)


def _flat(tree, path=""):
    for key, value in tree.items():
        yield from _flat(value, f"{path}{key}/") if isinstance(value, dict) else (f"{path}{key}",)


def test_tensorboard_has_numbers_and_pictures(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer_of(tiny_model("olmoe"), tmp_path, [monitor()], rows(4), report_to=["tensorboard"]).train()
    (folder,) = {file.parent for file in tmp_path.rglob("events.out.tfevents.*")}
    tags = EventAccumulator(str(folder)).Reload().Tags()
    assert {"train/srp/m4", "eval/srp/m4", "eval/balance/cv", "tradeoff/eval_loss"} <= set(tags["scalars"])
    assert {"eval/routing/eval", "eval/cache/curve"} <= set(tags["images"])


def test_in_trls_trainer(tmp_path):
    from trainer_matrix import tokenizer
    from trl import SFTConfig, SFTTrainer

    def data(seed):
        return [row["input_ids"].tolist()[: T - 3 * (index % 2)] for index, row in enumerate(rows(4, seed))]

    options = PLAIN_SGD | {
        "output_dir": str(tmp_path), "max_steps": 2, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 4,
        "eval_strategy": "steps", "eval_steps": 2, "bf16": False, "gradient_checkpointing": False,
        "router_aux_loss_coef": 0.0, "dataset_kwargs": {"skip_prepare_dataset": True},
    }  # fmt: skip
    model = tiny_model("olmoe")
    trainer = SFTTrainer(
        model, SFTConfig(**options), train_dataset=datasets.Dataset.from_dict({"input_ids": data(0)}),
        eval_dataset=datasets.Dataset.from_dict({"input_ids": data(1)}), processing_class=tokenizer(),
    )  # fmt: skip
    monitor().add_to(trainer)
    trainer.train()
    (log,) = evaluations(trainer)
    assert log["eval_srp/m4"] == pytest.approx(by_hand(model, rows(4, seed=1))["srp/m4"])
    assert "srp/m4" in next(log for log in trainer.state.log_history if "loss" in log)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"segment_lengths": (1,)}, "segment_lengths"), ({"cache_ratios": (0.0,)}, "cache_ratios must be a list of")],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RoutingMonitorCallback(**options)
