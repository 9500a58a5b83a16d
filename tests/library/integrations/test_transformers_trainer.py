"""ConsistencyCallback in transformers' Trainer: normalized, scheduled, logged, resumed."""

import json
import warnings

import pytest
import torch
import transformers
from parameters import parameters
from plain_sgd import PLAIN_SGD
from tiny_models import tiny_model, token_ids

from consistency_reg import LoadBalanceLoss, LocalConsistencyLoss, RouterAnchorLoss, RouterCapture
from consistency_reg.integrations import ConsistencyCallback, attach
from consistency_reg.integrations.attach import attachments

T = 12
LOSS = LocalConsistencyLoss((3, 5), scope="sequence")


def rows(count, *, ragged=False, seed=0):
    """Rows of tokens with labels; ragged ones are padded to T."""
    ids = token_ids(count, T, seed)
    data = []
    for index, row in enumerate(ids):
        real = T - (index * 5 % 7 if ragged else 0)
        mask = (torch.arange(T) < real).long()
        data.append({"input_ids": row, "attention_mask": mask, "labels": row.where(mask.bool(), -100)})
    return data


def trainer_of(model, folder, data, batch_size, callbacks=(), **options):
    options = PLAIN_SGD | {"output_dir": str(folder), "per_device_train_batch_size": batch_size} | options
    return transformers.Trainer(
        model, transformers.TrainingArguments(**options), train_dataset=data, callbacks=list(callbacks)
    )


def train(folder, data, batch_size, callbacks=(), *, model=None, accepts=True, **options):
    model = tiny_model("olmoe") if model is None else model
    model.accepts_loss_kwargs = accepts
    trainer = trainer_of(model, folder, data, batch_size, callbacks, **options)
    trainer.train()
    return model, trainer


def callback(**options):
    return ConsistencyCallback(LOSS, **({"weight": 5.0} | options))


# --- normalization ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accepts", "ragged", "count"),
    [(True, True, 12), (False, False, 12)],
)
def test_accumulation_4x2_equals_1x8(tmp_path, accepts, ragged, count):
    """Whether the trainer sums micro-batches (num_items_in_batch) or averages them; the last step may be shorter."""
    data = rows(count, ragged=ragged)
    whole, _ = train(tmp_path, data, 8, [callback()], accepts=accepts)
    parts, _ = train(tmp_path, data, 2, [callback()], accepts=accepts, gradient_accumulation_steps=4)
    torch.testing.assert_close(parameters(whole), parameters(parts), rtol=1e-5, atol=1e-6)
    plain, _ = train(tmp_path, data, 8, accepts=accepts)
    assert not torch.allclose(parameters(whole), parameters(plain), rtol=1e-3, atol=1e-4)


def test_the_two_ways_of_the_trainer_give_the_same(tmp_path):
    summed, averaged = (
        train(tmp_path, rows(16), 2, [callback()], accepts=accepts, gradient_accumulation_steps=4)[0]
        for accepts in (True, False)
    )
    torch.testing.assert_close(parameters(summed), parameters(averaged), rtol=1e-5, atol=1e-6)


def test_attach_alone_serves_a_trainer_that_averages_micro_batches(tmp_path):
    options = {"accepts": False, "gradient_accumulation_steps": 4}
    with_callback, _ = train(tmp_path, rows(16), 2, [callback()], **options)
    model = tiny_model("olmoe")
    attach(model, LOSS, 5.0)
    train(tmp_path, rows(16), 2, model=model, **options)
    torch.testing.assert_close(parameters(model), parameters(with_callback), rtol=1e-5, atol=1e-6)


def test_attach_alone_is_refused_by_a_trainer_that_adds_them_up(tmp_path):
    model = tiny_model("olmoe")
    attach(model, LOSS, 5.0)
    with pytest.raises(RuntimeError, match=r"given num_items_in_batch.*use ConsistencyCallback\(\.\.\.\)\.add_to"):
        train(tmp_path, rows(16), 2, model=model)


# --- weight and logs ----------------------------------------------------------------------------------------------


def test_the_weight_is_scheduled_and_the_term_logged(tmp_path):
    model, trainer = train(
        tmp_path,
        rows(24),
        2,
        [callback(warmup_steps=2, start_step=2, end_step=6, cooldown_steps=2)],
        gradient_accumulation_steps=2,
    )
    logs = [log for log in trainer.state.log_history if "consistency/loss" in log]
    assert [log["consistency/weight"] for log in logs] == [0, 0, 0, 2.5, 5, 2.5]
    for log in logs:
        assert 0 < log["consistency/loss"] < 1
        assert log["consistency/weighted"] == pytest.approx(log["consistency/weight"] * log["consistency/loss"])
        layers = [log["consistency/layer_00"], log["consistency/layer_01"]]
        assert sum(layers) / 2 == pytest.approx(log["consistency/loss"])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_logs_are_means_since_the_last_one(tmp_path):
    every = {}
    for logging_steps in (1, 3):
        _, trainer = train(tmp_path, rows(24), 4, [callback()], logging_steps=logging_steps)
        every[logging_steps] = [log["consistency/loss"] for log in trainer.state.log_history if "loss" in log]
    assert every[3] == pytest.approx([sum(every[1][:3]) / 3, sum(every[1][3:]) / 3])


def test_evaluation_loss_is_without_the_term(tmp_path):
    model, trainer = train(tmp_path, rows(8), 8, [callback()])
    attach(model, LOSS, 5.0)
    before = trainer.evaluate(rows(4, seed=1))["eval_loss"]
    ids = torch.stack([row["input_ids"] for row in rows(4, seed=1)])
    assert before == pytest.approx(model.eval()(ids, labels=ids).loss.item(), rel=1e-5)


class Reporter(transformers.TrainerCallback):
    """Stands where wandb's stands: before the callbacks that a user gives."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def test_reporters_see_the_term_of_a_callback_that_is_added_before_them(tmp_path):
    late, early = Reporter(), Reporter()
    train(tmp_path, rows(8), 4, [late, callback()])
    assert not any("consistency/loss" in logs for logs in late.logs)
    trainer = trainer_of(tiny_model("olmoe"), tmp_path, rows(8), 4, [early])
    callback().add_to(trainer)
    trainer.train()
    assert [log["consistency/loss"] for log in early.logs if "loss" in log] == [
        log["consistency/loss"] for log in trainer.state.log_history if "loss" in log
    ]


def test_tensorboard_has_it_below_train(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = trainer_of(tiny_model("olmoe"), tmp_path, rows(8), 4, report_to=["tensorboard"])
    ConsistencyCallback(LOSS).add_to(trainer)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        trainer.train()
    (folder,) = {file.parent for file in tmp_path.rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(folder)).Reload()
    assert {"train/loss", "train/consistency/loss", "train/consistency/layer_00"} <= set(events.Tags()["scalars"])


def test_a_reporter_that_would_miss_it_is_warned_of(tmp_path):
    trainer = trainer_of(tiny_model("olmoe"), tmp_path, rows(4), 4, [callback()], report_to=["tensorboard"])
    with pytest.warns(UserWarning, match=r"\['tensorboard'\] will not see consistency.*\.add_to\(trainer\)"):
        trainer.train()


# --- resuming -----------------------------------------------------------------------------------------------------


def test_a_resumed_run_equals_one_that_was_not_stopped(tmp_path):
    """A loss with a state of its own, and a weight that rises.

    The model is loaded from the checkpoint: resuming in transformers 5.23 takes no experts that are stored one by one.
    """

    def one():
        return ConsistencyCallback(LoadBalanceLoss(running=0.9), weight=5.0, warmup_steps=8)

    straight, _ = train(tmp_path, rows(16), 2, [one()], save_strategy="steps", save_steps=4)
    checkpoint = tmp_path / "checkpoint-4"
    again = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    trainer_of(again, tmp_path, rows(16), 2, [one()]).train(resume_from_checkpoint=str(checkpoint))
    torch.testing.assert_close(parameters(again), parameters(straight), rtol=0, atol=0)
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert state["log_history"][-1]["balance/weight"] == pytest.approx(5.0 * 3 / 8)


def test_a_second_training_adds_the_term_once(tmp_path):
    """Also after one that failed in between."""
    first, second = tiny_model("olmoe"), tiny_model("olmoe")
    train(tmp_path, rows(4), 4, [callback()], model=first)
    twice = callback()
    trainer = trainer_of(second, tmp_path, [{"input_ids": row["input_ids"]} for row in rows(4)], 4, [twice])
    with pytest.raises(ValueError, match="did not return a loss"):
        trainer.train()
    train(tmp_path, rows(4), 4, [twice], model=second)
    assert torch.equal(parameters(first), parameters(second))


class Interrupts(transformers.TrainerCallback):
    def on_step_end(self, *_, **__):
        raise KeyboardInterrupt


def test_a_training_after_an_interrupted_one_has_the_term_once(tmp_path):
    """A notebook's cell that was stopped and is run again, with a new callback; two terms of one training stay."""
    interrupted, fresh = tiny_model("olmoe"), tiny_model("olmoe")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, rows(4), 4, [callback(), Interrupts()], model=interrupted, learning_rate=0.0)
    for model in (interrupted, fresh):
        train(tmp_path, rows(4), 4, [callback(), callback(weight=1.0, name="second")], model=model)
    once = tiny_model("olmoe")
    train(tmp_path, rows(4), 4, [callback(weight=6.0)], model=once)
    assert torch.equal(parameters(interrupted), parameters(fresh))
    torch.testing.assert_close(parameters(fresh), parameters(once), rtol=1e-6, atol=1e-7)


def test_a_state_that_is_not_found_is_told(tmp_path):
    """Resumed into another folder than that of the checkpoint, where nobody told where it was."""
    options = {"save_strategy": "steps", "save_steps": 2}
    train(tmp_path / "first", rows(16), 4, [ConsistencyCallback(LoadBalanceLoss(running=0.9))], **options)
    checkpoint = tmp_path / "first" / "checkpoint-2"
    again = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    trainer = trainer_of(again, tmp_path / "second", rows(16), 4, [ConsistencyCallback(LoadBalanceLoss(running=0.9))])
    with pytest.warns(
        UserWarning,
        match=r"state of LoadBalanceLoss begins anew, as there is no .*second/checkpoint-2/.* with 'balance'",
    ):
        trainer.train(resume_from_checkpoint=str(checkpoint))


# --- several terms ------------------------------------------------------------------------------------------------


def three_terms(model):
    """Consistency, a balance and an anchor: two of them have a state."""
    return [
        ConsistencyCallback(LOSS, 5.0),
        ConsistencyCallback(LoadBalanceLoss(running=0.9), 3.0),
        ConsistencyCallback(RouterAnchorLoss(RouterCapture(model).frozen_routers()), 2.0),
    ]


def test_three_terms_are_logged_each_by_its_name_and_add_up(tmp_path):
    model, by_hand = tiny_model("olmoe"), tiny_model("olmoe").train()
    _, trainer = train(tmp_path, rows(4), 4, three_terms(model), model=model)
    ids = torch.stack([row["input_ids"] for row in rows(4)])
    with RouterCapture(by_hand, keep_inputs=True) as capture:
        loss = by_hand(ids, labels=ids).loss
    for term, (name, weight) in zip(
        three_terms(by_hand), {"consistency": 5.0, "balance": 3.0, "anchor": 2.0}.items(), strict=True
    ):
        value = term.loss(capture.trace())
        loss = loss + weight * value
        log = trainer.state.log_history[0]
        assert log[f"{name}/loss"] == pytest.approx(value.item(), rel=1e-5, abs=1e-7)
        assert (log[f"{name}/weight"], f"{name}/layer_01" in log) == (weight, True)
    loss.backward()
    torch.optim.SGD(by_hand.parameters(), lr=0.5).step()
    torch.testing.assert_close(parameters(model), parameters(by_hand), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("anchored", [False, True])
def test_a_resumed_run_of_several_terms_equals_one_that_was_not_stopped(tmp_path, anchored):
    def terms(model):
        balances = [
            ConsistencyCallback(LoadBalanceLoss(running=0.9), 5.0),
            ConsistencyCallback(LoadBalanceLoss(running=0.5), 3.0, name="fast"),
        ]
        return [*three_terms(model), balances[1]] if anchored else balances

    straight = tiny_model("olmoe")
    frozen = terms(straight)
    train(tmp_path, rows(16), 2, frozen, model=straight, save_strategy="steps", save_steps=4)
    checkpoint = tmp_path / "checkpoint-4"
    states = torch.load(checkpoint / "consistency_loss.pt", weights_only=True)
    assert list(states) == (["balance", "anchor", "fast"] if anchored else ["balance", "fast"])
    again = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*begins anew")
        trainer = trainer_of(again, tmp_path, rows(16), 2, terms(again))
        trainer.train(resume_from_checkpoint=str(checkpoint))
    torch.testing.assert_close(parameters(again), parameters(straight), rtol=0, atol=0)


def test_two_of_a_kind_without_names_are_warned_of_and_told_apart(tmp_path):
    with pytest.warns(UserWarning, match=r"2 terms of a LocalConsistencyLoss are trained at once: name each"):
        _, trainer = train(tmp_path, rows(4), 4, [callback(), callback(weight=1.0)])
    log = trainer.state.log_history[0]
    assert (log["consistency/weight"], log["consistency_2/weight"]) == (5.0, 1.0)


def test_two_of_a_kind_with_names(tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*terms of a")
        _, trainer = train(tmp_path, rows(4), 4, [callback(), callback(weight=1.0, name="late", start_step=3)])
    log = trainer.state.log_history[0]
    assert (log["consistency/weight"], log["late/weight"]) == (5.0, 0.0)


def test_the_state_of_one_term_as_it_was_written_before_is_read(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    straight, _ = train(tmp_path, rows(8), 2, [ConsistencyCallback(LoadBalanceLoss(running=0.9), 5.0)], **options)
    file = tmp_path / "checkpoint-2" / "consistency_loss.pt"
    torch.save(torch.load(file, weights_only=True)["balance"], file)
    again = transformers.AutoModelForCausalLM.from_pretrained(file.parent)
    trainer = trainer_of(again, tmp_path, rows(8), 2, [ConsistencyCallback(LoadBalanceLoss(running=0.9), 5.0)])
    trainer.train(resume_from_checkpoint=str(file.parent))
    assert torch.equal(parameters(again), parameters(straight))


@pytest.mark.parametrize("name", ["", "a/b", "two words", 3])
def test_a_name_that_is_no_word_is_refused(name):
    with pytest.raises(ValueError, match="name must be letters, digits, dots, dashes or underscores, got "):
        ConsistencyCallback(LOSS, name=name)


# --- bad input ----------------------------------------------------------------------------------------------------


class StrangeTrainer(transformers.Trainer):
    """Runs the model more often than it trains what comes of it."""

    untrained, later = False, False

    def compute_loss(self, model, inputs, **kwargs):
        if self.untrained:
            model(**inputs)
        if self.later:
            self.accelerator.backward(model(**inputs).loss)
        return super().compute_loss(model, inputs, **kwargs)


@pytest.mark.parametrize("what", ["untrained", "later"])
def test_a_micro_batch_whose_forwards_are_not_trained_once_is_refused(tmp_path, what):
    trainer = trainer_of(tiny_model("olmoe"), tmp_path, rows(4), 4, [callback()])
    trainer.__class__ = StrangeTrainer
    setattr(trainer, what, True)
    before = parameters(trainer.model)
    with pytest.raises(RuntimeError, match=r"in one micro-batch the model ran 2 times with a gradient, and [12] b"):
        trainer.train()
    assert torch.equal(parameters(trainer.model), before)


def test_a_model_that_is_not_in_training_mode_is_refused(tmp_path):
    trainer = trainer_of(tiny_model("olmoe"), tmp_path, rows(4), 4, [callback()])
    trainer.compute_loss = lambda model, inputs, **_: model.eval()(**inputs).loss
    with pytest.raises(RuntimeError, match="ran in no forward in training mode with a gradient in this micro-batch"):
        trainer.train()


@pytest.mark.parametrize("remove", [True, False])
@pytest.mark.parametrize("joined", [True, False])
def test_boundaries_of_documents_that_the_trainer_drops_are_missed(tmp_path, remove, joined):
    documents = torch.arange(T) // 6
    data = [row | {"document_ids": documents} for row in rows(4)]
    model, term = tiny_model("olmoe"), callback()
    trainer = trainer_of(model, tmp_path, data, 4, [] if joined else [term], remove_unused_columns=remove)
    if joined:
        term.add_to(trainer)
    if remove:
        with pytest.raises(RuntimeError, match=r"tells by \['document_ids'\].*remove_unused_columns=False.*masks="):
            trainer.train()
        return
    with RouterCapture(tiny_model("olmoe")) as capture, torch.no_grad():
        capture.model(torch.stack([row["input_ids"] for row in data]))
    trainer.train()
    expected = float(LOSS(capture.trace(None, documents.expand(4, -1))))
    assert trainer.state.log_history[0]["consistency/loss"] == pytest.approx(expected, rel=1e-5)


def test_a_column_that_may_tell_boundaries_and_is_dropped_is_said(tmp_path):
    data = [row | {"segment_ids": torch.arange(T) // 6, "doc_id": "of the row"} for row in rows(4)]
    trainer = trainer_of(tiny_model("olmoe"), tmp_path, data, 4, [callback()])
    with pytest.warns(UserWarning, match=r"may tell by \['segment_ids'\] where documents begin.*position_ids, or give"):
        trainer.train()


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from rows(6)


STREAM = {"gradient_accumulation_steps": 2, "max_steps": 2, "learning_rate": 0.0}


def test_the_end_of_a_stream_is_missed_by_a_callback_that_cannot_ask_the_trainer(tmp_path):
    trainer = trainer_of(tiny_model("olmoe"), tmp_path, Stream(), 2, [callback()], **STREAM)
    with pytest.raises(RuntimeError, match=r"had 1 micro-batches where 2 were expected.*add_to"):
        trainer.train()


def test_the_end_of_a_stream_within_a_step(tmp_path):
    """The Trainer adds the gradient of such a rest to that of the next step, each window normalized by itself."""
    gradients = []
    for weight in (0.0, 5.0):
        trainer = trainer_of(tiny_model("olmoe"), tmp_path, Stream(), 2, **STREAM)
        callback(weight=weight).add_to(trainer)
        gradients.append(note_gradients(trainer))
        trainer.train()
    model, right = tiny_model("olmoe").train(), []
    for windows in ([(0, 1)], [(2,), (0, 1)]):
        model.zero_grad()
        for window in windows:
            for number in window:
                part = rows(6)[2 * number : 2 * number + 2]
                with RouterCapture(model) as capture:
                    model(torch.stack([row["input_ids"] for row in part]))
                (5.0 * LOSS(capture.trace()) / len(window)).backward()
        right.append(gradient(model))
    for off, on, expected in zip(*gradients, right, strict=True):
        assert torch.allclose(on - off, expected, atol=1e-5)


def gradient(model):
    return torch.cat([(p * 0 if p.grad is None else p.grad).detach().flatten().clone() for p in model.parameters()])


def note_gradients(trainer):
    """The gradient of each optimizer step to come."""
    noted = []

    class Note(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            noted.append(gradient(model))

    trainer.add_callback(Note())
    return noted


def test_terms_are_numbered_in_the_order_in_which_they_were_added(tmp_path):
    trainer = trainer_of(tiny_model("olmoe"), tmp_path, rows(4), 4)
    for weight in (1.0, 2.0):
        callback(weight=weight).add_to(trainer)
    with pytest.warns(UserWarning, match="2 terms of a LocalConsistencyLoss"):
        trainer.train()
    log = trainer.state.log_history[0]
    assert (log["consistency/weight"], log["consistency_2/weight"]) == (1.0, 2.0)


def test_an_optimizer_step_of_another_length_is_refused(tmp_path):
    trainer = trainer_of(tiny_model("olmoe"), tmp_path, rows(4), 2, [callback()], gradient_accumulation_steps=2)
    trainer.add_callback(type("Wrong", (transformers.TrainerCallback,), {"on_substep_end": _end_twice})())
    with pytest.raises(RuntimeError, match="the optimizer step had 3 micro-batches where 2 were expected"):
        trainer.train()


def _end_twice(self, args, state, control, **kwargs):
    """As a trainer would that splits a micro-batch in two."""
    (attachment,) = attachments(kwargs["model"])
    attachment._seen += 1


def test_reentrant_checkpointing_is_refused(tmp_path):
    trainer = trainer_of(
        tiny_model("olmoe"),
        tmp_path,
        rows(4),
        4,
        [callback()],
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": True},
    )
    with (
        pytest.warns(UserWarning, match="use_reentrant=False"),
        pytest.raises(RuntimeError, match=r"no gradient.*use_reentrant=False"),
    ):
        trainer.train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -1.0}, "weight must be a finite number >= 0, got -1.0"),
        ({"warmup_steps": -1}, "warmup_steps must be >= 0, got -1"),
        ({"start_step": -2}, "start_step must be >= 0, got -2"),
        ({"end_step": 5, "start_step": 6}, r"end_step must be at least start_step .* = 6, got 5"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ConsistencyCallback(**options)
