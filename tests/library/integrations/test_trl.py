"""The term in TRL's SFTTrainer, which builds its loss from a fused LM head instead of the model's own."""

import copy

import datasets
import pytest
import torch
from parameters import parameters
from peft import LoraConfig
from plain_sgd import PLAIN_SGD, InOrder
from tiny_models import tiny_model, token_ids
from trainer_matrix import tokenizer
from trl import SFTConfig, SFTTrainer

from consistency_reg import LocalConsistencyLoss
from consistency_reg.integrations import ConsistencyCallback, attach

T = 12
LOSS = LocalConsistencyLoss((3, 5), scope="sequence")


def trainer_of(model, folder, *, rows=8, batch_size=4, callbacks=(), peft_config=None, **options):
    options = {
        **PLAIN_SGD,
        "output_dir": str(folder),
        "per_device_train_batch_size": batch_size,
        "bf16": False,
        "gradient_checkpointing": False,
        "router_aux_loss_coef": 0.0,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    } | options
    data = datasets.Dataset.from_dict({"input_ids": token_ids(rows, T).tolist()})
    return SFTTrainer(
        model,
        SFTConfig(**options),
        train_dataset=data,
        processing_class=tokenizer(),
        callbacks=list(callbacks),
        peft_config=peft_config,
    )


def expected_steps(weight, rows=8, batch_size=4):
    """What a loop of one's own over the same rows gives, loss by loss."""
    model = tiny_model("olmoe").train()
    attach(model, LOSS, weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for ids in token_ids(rows, T).split(batch_size):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return parameters(model)


class OrderedTrainer(InOrder, SFTTrainer):
    """An SFTTrainer that does not shuffle."""


def test_steps_are_those_of_the_loss_with_the_term(tmp_path):
    model = tiny_model("olmoe")
    trainer = trainer_of(model, tmp_path, callbacks=[ConsistencyCallback(LOSS, 5.0)])
    trainer.__class__ = OrderedTrainer
    trainer.train()
    torch.testing.assert_close(parameters(model), expected_steps(5.0), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(parameters(model), expected_steps(0.0), rtol=1e-3, atol=1e-4)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert all(0 < log["consistency/loss"] < 1 and log["consistency/weight"] == 5.0 for log in logs)


def test_attach_alone_is_refused(tmp_path):
    """The trainer leaves the model's loss aside, and none of what it trains says by what it was divided."""
    model = tiny_model("olmoe")
    attach(model, LOSS, 5.0)
    with pytest.raises(RuntimeError, match=r"something else of what it returned is trained.*ConsistencyCallback"):
        trainer_of(model, tmp_path).train()


def test_accumulation_4x2_equals_1x8(tmp_path):
    results = []
    for batch_size, accumulated in ((8, 1), (2, 4)):
        model = tiny_model("olmoe")
        callback = ConsistencyCallback(LOSS, 5.0)
        options = {"batch_size": batch_size, "gradient_accumulation_steps": accumulated}
        trainer_of(model, tmp_path, rows=16, callbacks=[callback], **options).train()
        results.append(parameters(model))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_lora_with_the_router(tmp_path):
    model = tiny_model("olmoe")
    before = copy.deepcopy(model)
    peft_config = LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["gate"])
    trainer = trainer_of(model, tmp_path, callbacks=[ConsistencyCallback(LOSS, 20.0)], peft_config=peft_config)
    trainer.train()
    logs = [log["consistency/loss"] for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 2
    merged = trainer.model.merge_and_unload()
    for layer in (0, 1):
        gates = [m.model.layers[layer].mlp.gate.weight for m in (before, merged)]
        assert not torch.allclose(*gates, atol=1e-3)


def test_evaluation_is_without_the_term(tmp_path):
    model = tiny_model("olmoe")
    trainer = trainer_of(model, tmp_path)
    before = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    attach(model, LOSS, 5.0)
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] == before
