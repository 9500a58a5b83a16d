"""What cache-aware routing adds to a step of the quickstart model: pairs of steps without and with it, in turn.

Time is that of the process, which others disturb less than the clock on the wall; with one thread they are the same.

python recipes/benchmarks/cache_aware_cost.py [--pairs 20] [--threads 1]
"""

import time
from contextlib import nullcontext

import torch
from quickstart import options_of, quickstart, update
from rows import append, quantiles
from torch import nn

from consistency_reg import CacheAwareRouting, RouterCapture


def main() -> None:
    options = options_of(__doc__, pairs=20, threads=1)
    made = quickstart()
    model, ids = made.model, made.ids

    def routed(aware: bool) -> CacheAwareRouting | nullcontext:
        return CacheAwareRouting(model, cache_ratio=2.0, strength=0.1) if aware else nullcontext()

    def train(aware: bool) -> float:
        with routed(aware):
            began = time.process_time()
            with RouterCapture(model) as capture:
                logits = model(ids, use_cache=False).logits
            trace = capture.trace()
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            loss = loss + 0.1 * made.balance(trace) + 0.001 * made.z_loss(trace) + 0.35 * made.consistency(trace)
            update(made, loss)
            return time.process_time() - began

    @torch.no_grad()
    def forward(aware: bool) -> float:
        with routed(aware):
            began = time.process_time()
            model(ids, use_cache=False)
            return time.process_time() - began

    size = made.size | {"slots": 8}
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
