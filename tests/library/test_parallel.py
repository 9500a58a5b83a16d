"""The term over two real processes: DDP and FSDP2 give the parameters of one process, uneven batches do not hang."""

import pytest
import torch
from accelerate import Accelerator
from parameters import parameters
from processes import on_processes
from tiny_models import tiny_model, token_ids
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from consistency_reg import LocalConsistencyLoss
from consistency_reg.integrations import attach

T, STEPS, ROWS = 12, 2, 4
WAYS, SCOPES = ("ddp", "fsdp2", "accelerate"), ("global", "sequence")


def batch(step):
    return token_ids(ROWS, T, seed=step)


def train(model, called, rows, optimizer=None, backward=torch.Tensor.backward):
    optimizer = optimizer or torch.optim.SGD(called.parameters(), lr=0.5)
    for step in range(STEPS):
        ids = batch(step)[rows]
        backward(called(input_ids=ids, labels=ids).loss)
        optimizer.step()
        optimizer.zero_grad()
    return parameters(model)


def of_two(rank, way, scope):
    rows, model = slice(rank, None, 2), tiny_model("olmoe").train()
    attach(model, LocalConsistencyLoss((3, 5), scope=scope), 5.0)
    if way == "ddp":
        return train(model, DistributedDataParallel(model), rows)
    if way == "fsdp2":
        mesh = init_device_mesh("cpu", (2,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return train(model, model, rows)
    accelerator = Accelerator(cpu=True)
    called, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.5))
    return train(model, called, rows, optimizer, accelerator.backward)


def uneven(rank):
    """Other numbers of rows and tokens on each process, and one with nothing but padding."""
    model = tiny_model("olmoe").train()
    attach(model, LocalConsistencyLoss((3, 5)), 5.0)
    called, values = DistributedDataParallel(model), []
    for rows, tokens, valid in [(4, 12, 12), (1, 12, 12), (2, 4 if rank else 12, 4), (2, 12, 0 if rank else 12)]:
        ids = token_ids(rows + rank, tokens, seed=rank)
        mask = (torch.arange(tokens) < valid).long().expand(rows + rank, tokens)
        loss = called(input_ids=ids, attention_mask=mask, labels=ids).loss
        loss.backward()
        values.append(loss.isfinite().item())
    return values


def joined(rank):
    """One process has two batches more."""
    model = tiny_model("olmoe").train()
    attach(model, LocalConsistencyLoss((3, 5), scope="batch"), 5.0)
    called, steps = DistributedDataParallel(model), 0
    with called.join():  # what accelerate's join_uneven_inputs does
        for step in range(1 + 2 * rank):
            ids = batch(step)
            called(input_ids=ids, labels=ids).loss.backward()
            steps += 1
    return steps


def everything(rank):
    found = {(way, scope): of_two(rank, way, scope) for way in WAYS for scope in SCOPES}
    return found | {"uneven": uneven(rank), "joined": joined(rank)}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of two processes found: they are started once."""
    return on_processes(2, everything, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_give_the_parameters_of_one(found, way, scope):
    one = tiny_model("olmoe").train()
    attach(one, LocalConsistencyLoss((3, 5), scope=scope), 5.0)
    expected = train(one, one, slice(None))
    for rank in (0, 1):
        torch.testing.assert_close(found[rank][way, scope], expected, rtol=1e-4, atol=1e-5)


def test_uneven_batches_do_not_hang(found):
    assert [of_rank["uneven"] for of_rank in found] == [[True] * 4] * 2


def test_uneven_numbers_of_batches_do_not_hang_with_a_loss_that_asks_no_other_process(found):
    assert [of_rank["joined"] for of_rank in found] == [1, 3]
