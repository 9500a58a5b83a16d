"""The term's own gradient over two real processes: a Trainer, DDP and FSDP2 give what one process gives."""

import pytest
import torch
import transformers
from parameters import parameters
from plain_sgd import PLAIN_SGD, InOrder
from processes import on_processes
from tiny_models import tiny_model, token_ids
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from consistency_reg import LocalConsistencyLoss
from consistency_reg.integrations import ConsistencyCallback, RoutingMonitorCallback, attach

T = 12


class OrderedTrainer(InOrder, transformers.Trainer):
    """A Trainer that does not shuffle."""


def rows():
    """Sixteen rows with unequally many labels."""
    data = []
    for index, ids in enumerate(token_ids(16, T)):
        labels = ids.clone()
        labels[: index % 5] = -100
        data.append({"input_ids": ids, "labels": labels})
    return data


def train(folder, scope, batch_size, **more):
    model = tiny_model("olmoe")
    options = PLAIN_SGD | {"output_dir": str(folder), "gradient_accumulation_steps": 2}
    options |= {"per_device_train_batch_size": batch_size} | more
    options |= {"per_device_eval_batch_size": 4, "eval_strategy": "epoch"}
    arguments = transformers.TrainingArguments(**options)
    trainer = OrderedTrainer(model, arguments, train_dataset=rows(), eval_dataset=rows()[:8])
    ConsistencyCallback(LocalConsistencyLoss((3, 5), scope=scope), 5.0).add_to(trainer)
    monitor = RoutingMonitorCallback((2, 4)).add_to(trainer)
    trainer.train()
    measured = next(log for log in trainer.state.log_history if "eval_srp/m4" in log)
    return parameters(model), measured["eval_srp/m4"], monitor.tokens


def step(model, called, ids):
    """One step of a loss that says nothing of its scale."""
    called(input_ids=ids).logits.square().mean().backward()
    torch.optim.SGD(called.parameters(), lr=0.5).step()
    return parameters(model)


def scaled(rank, way):
    model = tiny_model("olmoe").train()
    attach(model, LocalConsistencyLoss((3, 5)), 5.0, scale=1.0)
    ids = token_ids(4, T)[slice(rank, None, 2)]
    if way == "ddp":
        return step(model, DistributedDataParallel(model), ids)
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return step(model, model, ids)


def everything(rank, folder):
    trained = {scope: train(folder, scope, 2, ddp_backend="gloo") for scope in ("global", "sequence")}
    return trained | {way: scaled(rank, way) for way in ("ddp", "fsdp2")}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of two processes found: they are started once."""
    folder = tmp_path_factory.mktemp("processes")
    return on_processes(2, everything, folder, str(folder / "run"))


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["global", "sequence"])
def test_a_trainer_of_two_processes_equals_one(found, tmp_path, scope):
    expected, srp, tokens = train(tmp_path, scope, 4)
    for of_rank in found:
        trained, srp_of_both, tokens_of_both = of_rank[scope]
        torch.testing.assert_close(trained, expected, rtol=1e-5, atol=1e-6)
        assert (srp_of_both, tokens_of_both) == (pytest.approx(srp, abs=1e-6), tokens)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_a_term_with_a_scale_of_two_processes_equals_one(found, way):
    model = tiny_model("olmoe").train()
    attach(model, LocalConsistencyLoss((3, 5)), 5.0, scale=1.0)
    expected = step(model, model, token_ids(4, T))
    for of_rank in found:
        torch.testing.assert_close(of_rank[way], expected, rtol=1e-5, atol=1e-6)
