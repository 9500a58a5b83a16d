"""What the regularizer adds to a training step of the quickstart model: pairs of steps without and with it, in turn.

python recipes/benchmarks/regularizer_cost.py [--pairs 40] [--threads 2]
"""

import time

from quickstart import options_of, quickstart, update
from rows import append, quantiles
from torch import nn

from consistency_reg import RouterCapture


def main() -> None:
    options = options_of(__doc__, pairs=40, threads=2)
    made = quickstart()
    model, ids, size = made.model, made.ids, made.size

    def step(regularized: bool) -> float:
        began = time.perf_counter()
        with RouterCapture(model) as capture:
            logits = model(ids).logits
        trace = capture.trace()
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss = loss + 0.05 * made.balance(trace) + 0.001 * made.z_loss(trace)
        if regularized:
            loss = loss + 0.15 * made.consistency(trace)
        update(made, loss)
        return time.perf_counter() - began

    for _ in range(5):
        step(True)
    pairs = [(step(False), step(True)) for _ in range(options.pairs)]
    append(
        "regularizer_cost",
        [
            {"what": "step without the term", "unit": "s", **quantiles([plain for plain, _ in pairs]), **size},
            {"what": "step with / without the term", "unit": "ratio", **quantiles([b / a for a, b in pairs]), **size},
        ],
    )


if __name__ == "__main__":
    main()
