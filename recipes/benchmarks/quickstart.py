"""The quickstart model with its losses, as the benchmarks of a training step use it: a model, an optimizer, a batch."""

import argparse
from typing import NamedTuple

import torch
from torch import Tensor, nn

from consistency_reg import LoadBalanceLoss, LocalConsistencyLoss, RouterZLoss
from consistency_reg.lab.model import count_parameters, small_moe

ROWS, TOKENS, VOCABULARY, LAYERS = 8, 256, 2048, 3


class Quickstart(NamedTuple):
    """What a step needs, and ``size``, what its rows say of it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    balance: LoadBalanceLoss
    z_loss: RouterZLoss
    consistency: LocalConsistencyLoss
    ids: Tensor
    size: dict[str, int]


def options_of(description: str | None, pairs: int, threads: int) -> argparse.Namespace:
    """Return the options of a benchmark that times pairs of steps, and use as many threads as they say."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--pairs", type=int, default=pairs)
    parser.add_argument("--threads", type=int, default=threads)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    return options


def quickstart() -> Quickstart:
    """Return the model and what trains it."""
    model = small_moe(vocab_size=VOCABULARY, num_layers=LAYERS, context_length=TOKENS)
    total, active = count_parameters(model)
    size = {"parameters": total, "active": active, "rows": ROWS, "tokens": TOKENS, "layers": LAYERS, "experts": 32}
    return Quickstart(
        model,
        torch.optim.AdamW(model.parameters(), lr=1e-3),
        LoadBalanceLoss(running=0.95),
        RouterZLoss(),
        LocalConsistencyLoss(),
        torch.randint(VOCABULARY, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0)),
        size | {"top_k": 4},
    )


def update(made: Quickstart, loss: Tensor) -> None:
    """Take the optimizer's step."""
    loss.backward()
    nn.utils.clip_grad_norm_(made.model.parameters(), 1.0)
    made.optimizer.step()
    made.optimizer.zero_grad()
