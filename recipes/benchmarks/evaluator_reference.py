"""How much faster the evaluator is than the plain reference of the tests: the same document, ratios within one run.

    python recipes/benchmarks/evaluator_reference.py [--device cpu] [--documents 256] [--runs 3]

tests/reference.py holds literal loops over the definitions. It is given one document of 512 tokens (64 experts, 8 of
them active), the evaluator the whole batch; both are stated in seconds a document, one thread on the CPU. A cache
policy is timed at every size.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from evaluator import LENGTHS, E, T, parse, seconds, srp, sticky_ids
from rows import append, quantiles

from consistency_reg import RoutingTrace, functional

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from reference import best_f1_oracle, cache_hits_oracle, window_histograms_oracle


def reference_srp(ids: np.ndarray) -> None:
    valid, documents = np.ones(ids.shape[:2], dtype=bool), np.zeros(ids.shape[:2], dtype=int)
    for m in LENGTHS:
        for histogram in window_histograms_oracle(ids, E, m, valid, documents).sum(axis=0):
            best_f1_oracle(histogram)


def main() -> None:
    options = parse(__doc__, documents=256, runs=3)
    torch.set_num_threads(1)
    ids = sticky_ids(options.documents, options.device)
    document = ids[:1].tolist()
    trace = RoutingTrace([ids], num_experts=E)

    def reference_hits(policy: str, m: int | None = None) -> None:
        for size in range(1, E + 1):
            cache_hits_oracle(document[0], size, policy, m)

    cases: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "srp": (lambda: srp(trace), lambda: reference_srp(np.array(document))),
        "sch m=16": (lambda: functional.sch(ids, E, 16), lambda: reference_hits("sch", 16)),
    }
    for policy in ("lru", "lfu", "belady"):
        cases[policy] = (
            lambda policy=policy: functional.cache_hit_rate(ids, E, policy=policy),
            lambda policy=policy: reference_hits(policy),
        )
    rows = []
    for name, (run, reference) in cases.items():
        ours = quantiles([duration / options.documents for duration in seconds(run, options.device, options.runs)])
        plain = quantiles(seconds(reference, "cpu", options.runs))["median"]
        row = {"what": name, "unit": "s/document", **ours, "documents": options.documents, "tokens": T}
        rows.append(row | {"reference": plain, "ratio": plain / ours["median"], "on": options.device})
    append("evaluator_reference", rows)


if __name__ == "__main__":
    main()
