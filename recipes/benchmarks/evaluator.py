"""How long the evaluator takes, for a layer of 64 experts of which 8 are active, against the published CPU scripts.

    python recipes/benchmarks/evaluator.py [--device cpu] [--documents 1000] [--runs 5]

One thread on the CPU. The paper's figures (arXiv 2505.16056, its scripts on one thread of the kind of machine that the
first rows were made on) are those of the project's issue tracker: SRP of 256 documents for m = 4, 16, 64, 256 in
0.51 s, with 1000 bootstrap replicates 1.38 s; a document takes SCH 44 ms for one m, LRU 29 ms, LFU 27 ms, Belady 15 ms.
"""

import argparse
import time
from collections.abc import Callable

import torch
from rows import append, quantiles

from consistency_reg import RoutingTrace, SegmentRoutingPerformance, functional

E, K, T = 64, 8, 512
LENGTHS = (4, 16, 64, 256)
PAPER = {"srp": 0.51, "srp with 1000 replicates": 1.38, "sch m=16": 0.044, "lru": 0.029, "lfu": 0.027, "belady": 0.015}


def sticky_ids(documents: int, device: str) -> torch.Tensor:
    """[documents, T, K] expert ids that change slowly, as routing with some local consistency does."""
    generator = torch.Generator(device).manual_seed(0)
    noise = torch.randn(documents, T, E, generator=generator, device=device)
    slow = torch.randn(documents, T // 32, E, generator=generator, device=device).repeat_interleave(32, dim=1)
    return (noise + slow).topk(K).indices


def seconds(run: Callable[[], object], device: str, runs: int) -> list[float]:
    times = []
    for _ in range(runs + 1):
        began = time.perf_counter()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return times[1:]


def srp(trace: RoutingTrace, replicates: int = 0) -> None:
    metric = SegmentRoutingPerformance.from_trace(trace, LENGTHS, replicates=replicates)
    metric.update(trace)
    metric.compute()


def parse(description: str | None, documents: int, runs: int) -> argparse.Namespace:
    """Device, documents and runs from the command line, with these defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--documents", type=int, default=documents)
    parser.add_argument("--runs", type=int, default=runs)
    return parser.parse_args()


def main() -> None:
    options = parse(__doc__, documents=1000, runs=5)
    torch.set_num_threads(1)
    ids = sticky_ids(options.documents, options.device)
    trace = RoutingTrace([ids[:256]], num_experts=E)
    cases: dict[str, tuple[int, Callable[[], object]]] = {
        "srp": (1, lambda: srp(trace)),
        "srp with 1000 replicates": (1, lambda: srp(trace, 1000)),
        "sch m=16": (options.documents, lambda: functional.sch(ids, E, 16)),
    }
    for policy in ("lru", "lfu", "belady"):
        cases[policy] = (options.documents, lambda policy=policy: functional.cache_hit_rate(ids, E, policy=policy))
    rows = []
    for name, (units, run) in cases.items():
        times = [duration / units for duration in seconds(run, options.device, options.runs)]
        unit = "s" if units == 1 else "s/document"
        row = {"what": name, "unit": unit, **quantiles(times), "documents": 256 if units == 1 else units}
        rows.append(row | {"paper": PAPER[name], "speed-up": PAPER[name] / row["median"], "on": options.device})
    append("evaluator", rows)


if __name__ == "__main__":
    main()
