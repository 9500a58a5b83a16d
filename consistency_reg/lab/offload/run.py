"""Run one model over some prompts under a budget, and show what it writes."""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from consistency_reg import CacheAwareRouting
from consistency_reg.functional.cache_hits import cache_hit_counts
from consistency_reg.lab.checkpoint import model_folder, read_tokenizer
from consistency_reg.lab.offload.decoding import READ_AT_ONCE, Pass, read_text, sampler, write_text
from consistency_reg.lab.offload.measure import Measured
from consistency_reg.offload import OffloadedExperts
from consistency_reg.offload.calibration import calibrate
from consistency_reg.optional import require

with require("transformers"):
    from transformers import PreTrainedTokenizerBase
with require("plots"):
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

TAIL = 48  # letters of the text beside the progress


def measure(place: str, prompts: Sequence[str], options: argparse.Namespace, console: Console) -> Iterator[Measured]:
    """Run one model over all prompts, once for each strength of the bias."""
    path = str(model_folder(Path(place)) or place)
    tokenizer = read_tokenizer(path)
    encoded = [_encode(tokenizer, prompt, place) for prompt in prompts]
    budget = {
        "cache_ratio": options.cache_ratio,
        "slots": options.slots,
        "memory": options.memory,
        "device": options.device,
        "store": options.store,
        "policy": options.policy,
        "reads": options.reads,
        "dtype": options.dtype,
        "read_bandwidth": options.read_bandwidth,
        "best_last": True,
    }
    auto = options.spread == "auto"
    offloaded = OffloadedExperts(path, spread="equal" if auto else options.spread, record=auto, **budget)
    _check_context(offloaded.config, encoded, options, place)
    if auto:
        curves = _curves(offloaded, encoded, options)
        offloaded = OffloadedExperts(path, spread="auto", curves=curves, **budget)
    strengths = options.cache_aware or [_configured_strength(offloaded.config)]
    ratio = _equal_ratio(offloaded) if any(strengths) else 0.0
    with offloaded as model:
        for strength in strengths:
            name = _name(path, place) + (f" + bias {strength:g}" if strength else "")
            with ExitStack() as stack:
                if strength:
                    stack.enter_context(CacheAwareRouting(model, ratio, strength))
                first = encoded[0][None].to(offloaded.device)
                calibration = calibrate(offloaded, first) if options.calibrate else None
                passes = list(_run(offloaded, encoded, tokenizer, name, options, console))
            texts = ["" if options.read else str(tokenizer.decode(one.ids)) for one in passes]
            yield Measured(name, _about(offloaded, place, strength, options), passes, texts, calibration)


def _configured_strength(config: Any) -> float:
    """Return the strength of the bias that a model is to be deployed with, as its configuration says; 0 for none."""
    deployment = getattr(config, "cache_aware_routing", None) or {}
    return float(deployment.get("strength", 0.0))


def _curves(offloaded: OffloadedExperts, encoded: Sequence[Tensor], options: argparse.Namespace) -> list[list[float]]:
    """Return the hits of every number of slots for each layer, from a first run that records its routing."""
    total = [torch.zeros(E, dtype=torch.float64) for E in offloaded.num_experts]
    with offloaded:
        for number, ids in enumerate(encoded):
            if options.read:
                read_text(offloaded, ids, READ_AT_ONCE)
            else:
                write_text(offloaded, ids, options.tokens, sampler(options.temperature, options.seed + number))
            for hits, ids_TK in zip(total, offloaded.routing(), strict=True):
                counts = cache_hit_counts(ids_TK.flip(-1)[None], len(hits), options.policy, cold="miss")
                hits += counts.hits[0]
    return [hits.tolist() for hits in total]


def _run(
    offloaded: OffloadedExperts,
    encoded: Sequence[Tensor],
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    options: argparse.Namespace,
    console: Console,
) -> Iterator[Pass]:
    """Go through the prompts, with a line of progress while tokens come and each text when it is complete."""
    progress = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("{task.fields[tail]}", markup=False),
        console=Console(stderr=True),
        transient=True,
    )
    with progress:
        for number, ids in enumerate(encoded):
            if options.read:
                done = read_text(offloaded, ids, READ_AT_ONCE)
            else:
                task = progress.add_task(f"{name}, prompt {number + 1}", total=options.tokens, rate="", tail="")
                told = _Told(progress, task, tokenizer)
                choose = sampler(options.temperature, options.seed + number)
                done = write_text(offloaded, ids, options.tokens, choose, told)
                progress.remove_task(task)
            misses = sum(step.misses for step in done.steps) / len(done.steps)
            rate = len(done.seconds) / sum(done.seconds)
            counted = f"{len(done.seconds)} tokens, {rate:.1f} tokens/s, {misses:.2f} misses/token"
            said = f"{name}, prompt {number + 1}: {counted}"
            console.print(said, style="bold", markup=False, highlight=False)
            if not options.read:
                console.print(tokenizer.decode([*ids.tolist(), *done.ids]), markup=False, highlight=False)
            yield done


class _Told:
    """Bring progress up to date as tokens come, with tokens/s since the first."""

    def __init__(self, progress: Progress, task: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        self._progress, self._task, self._tokenizer = progress, task, tokenizer
        self._ids: list[int] = []

    def __call__(self, token: int) -> None:
        self._ids.append(token)
        speed = self._progress.tasks[self._progress.task_ids.index(self._task)].speed
        tail = " ".join(str(self._tokenizer.decode(self._ids[-TAIL:])).split())[-TAIL:]
        rate = "" if speed is None else f"{speed:.1f} tokens/s"
        self._progress.update(self._task, advance=1, rate=rate, tail=tail)


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str, place: str) -> Tensor:
    ids = tokenizer(prompt, verbose=False)["input_ids"]
    if len(ids) < 2:
        raise ValueError(f"{place}: a prompt must have at least 2 tokens, and {prompt[:20]!r} has {len(ids)}")
    return torch.tensor(ids)


def _check_context(config: Any, encoded: Sequence[Tensor], options: argparse.Namespace, place: str) -> None:
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, encoded))
    if options.read and longest <= READ_AT_ONCE + 1:
        raise ValueError(f"--read needs texts of more than {READ_AT_ONCE + 1} tokens, got {longest}")
    needed = longest + (0 if options.read else options.tokens)
    if context is not None and needed > context:
        raise ValueError(
            f"{place} reads {context} tokens, and a prompt of {longest} with {needed - longest} more would be {needed}"
        )


def _equal_ratio(offloaded: OffloadedExperts) -> float:
    if len(set(offloaded.slots)) > 1 or offloaded.top_k is None:
        raise ValueError(f"--cache-aware needs the same number of slots in every layer, got {offloaded.slots}")
    return offloaded.slots[0] / offloaded.top_k


def _name(path: str, place: str) -> str:
    folder = Path(path).resolve()
    return place if not folder.is_dir() else folder.parent.name if folder.name == "model" else folder.name


def _about(offloaded: OffloadedExperts, place: str, strength: float, options: argparse.Namespace) -> dict[str, Any]:
    found = offloaded.statistics()
    shown = ("store", "policy", "reads", "read_bandwidth", "spread", "tokens", "temperature", "seed")
    return {
        "place": place,
        "slots": found.slots,
        "experts": offloaded.num_experts,
        "top_k": offloaded.top_k,
        "cache_aware": strength,
        "dense_bytes": offloaded.dense_bytes,
        "slot_bytes": found.slot_bytes,
        "buffer_bytes": found.buffer_bytes,
        "expert_bytes": [offloaded.expert_bytes(layer) for layer in range(len(offloaded.slots))],
        "way": found.way,
        "device": str(offloaded.device),
        **{name: getattr(options, name) for name in shown},
    }
