"""What cache-aware routing adds to a step of the quickstart model: pairs of steps without and with it, in turn.

Time is that of the process, which others disturb less than the clock on the wall; with one thread they are the same.

python recipes/benchmarks/cache_aware_cost.py [--pairs 20] [--threads 1]
"""

import argparse
import time
from contextlib import nullcontext

import torch
from rows import append, quantiles
from torch import nn

from consistency_reg import CacheAwareRouting, LoadBalanceLoss, LocalConsistencyLoss, RouterCapture, RouterZLoss
from consistency_reg.lab.model import count_parameters, small_moe

ROWS, TOKENS, VOCABULARY = 8, 256, 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    model = small_moe(vocab_size=VOCABULARY, num_layers=3, context_length=TOKENS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    balance, z_loss, consistency = LoadBalanceLoss(running=0.95), RouterZLoss(), LocalConsistencyLoss()
    ids = torch.randint(VOCABULARY, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))

    def routed(aware: bool) -> CacheAwareRouting | nullcontext:
        return CacheAwareRouting(model, cache_ratio=2.0, strength=0.1) if aware else nullcontext()

    def train(aware: bool) -> float:
        with routed(aware):
            began = time.process_time()
            with RouterCapture(model) as capture:
                logits = model(ids, use_cache=False).logits
            trace = capture.trace()
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            loss = loss + 0.1 * balance(trace) + 0.001 * z_loss(trace) + 0.35 * consistency(trace)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            return time.process_time() - began

    @torch.no_grad()
    def forward(aware: bool) -> float:
        with routed(aware):
            began = time.process_time()
            model(ids, use_cache=False)
            return time.process_time() - began

    total, active = count_parameters(model)
    size = {"parameters": total, "active": active, "rows": ROWS, "tokens": TOKENS, "layers": 3, "experts": 32}
    size |= {"top_k": 4, "slots": 8}
    for what, step in (("training step", train), ("forward", forward)):
        for _ in range(3):
            step(False), step(True)
        pairs = [(step(False), step(True)) for _ in range(options.pairs)]
        append(
            "cache_aware_cost",
            [
                {"what": f"{what} without", "unit": "s", **quantiles([plain for plain, _ in pairs]), **size},
                {"what": f"{what} with", "unit": "s", **quantiles([aware for _, aware in pairs]), **size},
                {"what": f"{what} with / without", "unit": "ratio", **quantiles([b / a for a, b in pairs]), **size},
            ],
        )


if __name__ == "__main__":
    main()
