"""Cache-aware routing in the training forwards of `attach` and of transformers' Trainer."""

import copy

import pytest
import torch
import transformers
from architectures import draw_routers
from parameters import parameters
from plain_sgd import PLAIN_SGD
from tiny_models import tiny_model, token_ids

from consistency_reg import CacheAwareRouting, LocalConsistencyLoss, RouterCapture, attach
from consistency_reg.integrations import ConsistencyCallback
from consistency_reg.rerouting import RoutingSchedule

LOSS = LocalConsistencyLoss((3, 5))
STRENGTH, RATIO, T = 0.4, 1.5, 12


def model():
    tiny = tiny_model("olmoe")
    draw_routers(RouterCapture(tiny))
    return tiny.train()


def schedule(**options):
    return RoutingSchedule(STRENGTH, cache_ratio=RATIO, **options)


def by_hand(ids, settings, weight=0.0, batch_size=2):
    """A loop of SGD whose step n has the (strength, cache ratio) n of ``settings``; the parameters after it."""
    trained = model()
    optimizer = torch.optim.SGD(trained.parameters(), lr=PLAIN_SGD["learning_rate"])
    for batch, (strength, ratio) in zip(ids.split(batch_size), settings, strict=True):
        with CacheAwareRouting(trained, ratio, strength), RouterCapture(trained) as capture:
            loss = trained(input_ids=batch, labels=batch).loss
        (loss + weight * LOSS(capture.trace())).backward()
        optimizer.step()
        optimizer.zero_grad()
    return parameters(trained)


def test_attach_trains_with_the_routing_and_leaves_evaluation_and_generation_alone():
    trained, ids = model(), token_ids(6, T)
    own = trained.eval()(ids).logits
    text = trained.generate(ids, max_new_tokens=4, do_sample=False)
    optimizer = torch.optim.SGD(trained.parameters(), lr=PLAIN_SGD["learning_rate"])
    with attach(trained, LOSS, 5.0, routing=schedule()) as term:
        assert torch.equal(trained(ids).logits, own)
        assert torch.equal(trained.generate(ids, max_new_tokens=4, do_sample=False), text)
        assert term.routing.hits == 0
        trained.train()
        with torch.no_grad():
            assert torch.equal(trained(ids).logits, own)
        for batch in ids.split(2):
            trained(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert term.routing.hits > 0
        copied = copy.deepcopy(trained)
    torch.testing.assert_close(parameters(trained), by_hand(ids, [(STRENGTH, RATIO)] * 3, 5.0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(copied(ids).logits, trained(ids).logits, rtol=0, atol=0)


def test_a_loop_gives_each_step_its_strength():
    trained = model()
    with attach(trained, LOSS, routing=schedule(start_step=1, ramp_steps=2)) as term:
        seen = []
        for step in range(4):
            term.begin_step(step)
            seen.append(term.routing.strength)
    assert seen == pytest.approx([0, 0, STRENGTH / 2, STRENGTH])


def test_another_routing_than_a_schedule_is_refused():
    with pytest.raises(TypeError, match="routing must be a RoutingSchedule"):
        attach(model(), LOSS, routing=0.1)


def trainer_of(trained, folder, ids, callbacks, **options):
    rows = [{"input_ids": row, "labels": row} for row in ids]
    arguments = PLAIN_SGD | {"output_dir": str(folder), "per_device_train_batch_size": 2} | options
    return transformers.Trainer(
        trained,
        transformers.TrainingArguments(**arguments, train_sampling_strategy="sequential"),
        train_dataset=rows,
        callbacks=callbacks,
    )


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_trainer_trains_with_the_routing_of_each_step(accumulated, tmp_path):
    trained, ids = model(), token_ids(8, T)
    spec = RoutingSchedule(STRENGTH, start_step=1, ramp_steps=2, cache_ratio=(1, 3))
    callback = ConsistencyCallback(LOSS, weight=0.0, routing=spec)
    options = {"per_device_train_batch_size": 2 // accumulated, "gradient_accumulation_steps": accumulated}
    trainer = trainer_of(trained, tmp_path, ids, [callback], **options)
    trainer.train()
    settings = [(spec.strength_at(step), spec.cache_ratio_at(step)) for step in range(4)]
    assert len({ratio for _, ratio in settings}) == 4
    torch.testing.assert_close(parameters(trained), by_hand(ids, settings), rtol=1e-4, atol=1e-5)
    logged = [row["consistency/routing"] for row in trainer.state.log_history if "consistency/routing" in row]
    assert logged == pytest.approx([strength for strength, _ in settings])
    assert not any(hook for module in trained.modules() for hook in module._forward_hooks.values())


def test_a_resumed_trainer_goes_on_as_one_that_was_not_stopped(tmp_path):
    ids, spec = token_ids(8, T), RoutingSchedule(STRENGTH, ramp_steps=3, cache_ratio=(1, 3))

    def run(folder, trained, **options):
        saving = {"save_strategy": "steps", "save_steps": 2}
        trainer = trainer_of(trained, folder, ids, [ConsistencyCallback(LOSS, weight=0.0, routing=spec)], **saving)
        trainer.train(**options)
        return parameters(trained)

    straight, checkpoint = run(tmp_path / "run", model()), str(tmp_path / "run" / "checkpoint-2")
    again = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)  # the trainer itself does not load experts
    torch.testing.assert_close(run(tmp_path / "run", again, resume_from_checkpoint=checkpoint), straight)
