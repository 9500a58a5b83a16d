"""What the regularizer adds to a training step of the quickstart model: pairs of steps without and with it, in turn.

python recipes/benchmarks/regularizer_cost.py [--pairs 40] [--threads 2]
"""

import argparse
import time

import torch
from rows import append, quantiles
from torch import nn

from consistency_reg import LoadBalanceLoss, LocalConsistencyLoss, RouterCapture, RouterZLoss
from consistency_reg.lab.model import count_parameters, small_moe

ROWS, TOKENS, VOCABULARY = 8, 256, 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    model = small_moe(vocab_size=VOCABULARY, num_layers=3, context_length=TOKENS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    balance, z_loss = LoadBalanceLoss(running=0.95), RouterZLoss()
    consistency = LocalConsistencyLoss()
    ids = torch.randint(VOCABULARY, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))

    def step(regularized: bool) -> float:
        began = time.perf_counter()
        with RouterCapture(model) as capture:
            logits = model(ids).logits
        trace = capture.trace()
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss = loss + 0.05 * balance(trace) + 0.001 * z_loss(trace)
        if regularized:
            loss = loss + 0.15 * consistency(trace)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - began

    for _ in range(5):
        step(True)
    pairs = [(step(False), step(True)) for _ in range(options.pairs)]
    total, active = count_parameters(model)
    size = {
        "parameters": total,
        "active": active,
        "rows": ROWS,
        "tokens": TOKENS,
        "layers": 3,
        "experts": 32,
        "top_k": 4,
    }
    append(
        "regularizer_cost",
        [
            {"what": "step without the term", "unit": "s", **quantiles([plain for plain, _ in pairs]), **size},
            {"what": "step with / without the term", "unit": "ratio", **quantiles([b / a for a, b in pairs]), **size},
        ],
    )


if __name__ == "__main__":
    main()
