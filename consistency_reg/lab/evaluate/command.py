"""``consistency-reg evaluate``: judge models by their routing, and say how large a cache of experts they need."""

import argparse
import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from consistency_reg.byte_sizes import parse_bandwidth, parse_bytes
from consistency_reg.functional.segments import check_segment_lengths
from consistency_reg.lab.arguments.evaluate import SEQUENCE_LENGTH, parser
from consistency_reg.lab.corpus.text import DOMAINS
from consistency_reg.lab.evaluate.cache_aware import priced as price_on
from consistency_reg.lab.evaluate.figures import NAMES, figures
from consistency_reg.lab.evaluate.measure import Evaluation, measure
from consistency_reg.lab.evaluate.memory import Device, Needs, Within, about_memory
from consistency_reg.lab.evaluate.memory_show import figure as memory_figure
from consistency_reg.lab.evaluate.memory_show import table as memory_table
from consistency_reg.lab.evaluate.models import Candidate, load
from consistency_reg.lab.evaluate.records import to_csv, to_json, usage_lines
from consistency_reg.lab.evaluate.run import record
from consistency_reg.lab.evaluate.tables import tables
from consistency_reg.lab.evaluate.text import corpus_documents, cut, dataset_documents, sampled
from consistency_reg.lab.evaluate.traces import Recording, load_trace, save_trace
from consistency_reg.lab.evaluate.tracking import log_to_wandb
from consistency_reg.lab.evaluate.verdict import verdict
from consistency_reg.lab.files import csv_text, write_atomically
from consistency_reg.lab.pricing.show import figure as price_figure
from consistency_reg.lab.pricing.show import price_table
from consistency_reg.lab.pricing.strengths import check_strengths
from consistency_reg.lab.provenance import git_commit, package_versions
from consistency_reg.lab.render.outputs import check_writable, write_pictures
from consistency_reg.lab.render.png import png
from consistency_reg.lab.render.terminal import print_tables, print_verdict
from consistency_reg.optional import require

with require("transformers"):
    import datasets

CACHE_AWARE = "cache_aware.csv"
WITHIN = "memory.csv"


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``consistency-reg evaluate``: tables on the terminal, JSON, CSV and PNGs in a folder."""
    options = _options(argv)
    about = {"git_commit": git_commit(), "versions": package_versions()}
    recordings = [load_trace(path) for path in options.trace]
    for recording in recordings if options.within is not None else ():
        Needs(recording, options.within)
    priced: list[dict[str, Any]] = []
    recordings += record_models(options, about, priced) if options.models else []
    evaluations = evaluate(recordings, options)
    within = [] if options.within is None else list(within_memory(evaluations, options))
    shown = [*tables(evaluations), *([price_table(priced)] if priced else [])]
    print_tables([*shown, *([memory_table(rows_of(within))] if within else [])])
    command = shlex.join(["consistency-reg", "evaluate", *(argv or ())])
    pictures = write(options.out, evaluations, {"command": command, **about}, priced, within)
    names = ["evaluation.json", "evaluation.csv", *([CACHE_AWARE] if priced else []), *([WITHIN] if within else [])]
    if options.usage_profile is not None:
        write_atomically(options.usage_profile, usage_lines(evaluations[0].recording))
    print(f"{options.out}: {', '.join([*names, *(path.name for path in pictures.values())])}")
    if options.wandb is not None:
        log_to_wandb(options.wandb, evaluations, pictures, options.out)
    print_verdict(verdict(evaluations, priced))
    return 0


def record_models(
    options: argparse.Namespace, about: dict[str, Any], priced: list[dict[str, Any]]
) -> Iterator[Recording]:
    """Run one model after the other over the same documents; ``priced`` gets the rows of ``--cache-aware``."""
    device = _device(options.device)
    documents = _documents(options)
    for name, place in options.models:
        candidate = load(place, device=device, dtype=options.dtype, trust_remote_code=options.trust_remote_code)
        if name:
            candidate = replace(candidate, name=name)
        length = _sequence_length(candidate, options.sequence_length)
        settings = {
            "place": place,
            "dtype": str(next(candidate.model.parameters()).dtype).removeprefix("torch."),
            "device": str(device),
            "sequence_length": length,
            "max_tokens": options.max_tokens,
            "sample_seed": options.seed,
            "data": options.data or "default corpus",
            **about_memory(candidate.model),
        }
        texts = cut(documents, candidate.encode, length, options.max_tokens)
        recording = record(candidate, texts, batch_size=options.batch_size, about={**about, **settings})
        recording.about["moe_layers"] = len(recording.layer_names)
        if options.save_trace is not None:
            options.save_trace.parent.mkdir(parents=True, exist_ok=True)
            save_trace(recording, options.save_trace)
        if options.cache_aware is not None:
            priced += price_on(
                candidate, texts, options.cache_aware, options.cache_ratios, options.method, options.batch_size
            )
        yield recording


def evaluate(recordings: Sequence[Recording], options: argparse.Namespace) -> list[Evaluation]:
    """Measure each recording; an encoder and a decoder each by itself, and no two by one name."""
    stacks = [stack for recording in recordings for stack in recording.stacks()]
    names = [stack.model for stack in stacks]
    earlier = [names[:i].count(name) for i, name in enumerate(names)]
    return [
        measure(
            replace(stack, model=f"{stack.model} ({again + 1})") if again else stack,
            segment_lengths=options.segment_lengths,
            cache_ratios=options.cache_ratios,
            replicates=options.replicates,
            shared_cache=options.shared_cache,
            device=_device(options.device),
        )
        for stack, again in zip(stacks, earlier, strict=True)
    ]


def write(
    folder: Path,
    evaluations: Sequence[Evaluation],
    about: dict[str, Any],
    priced: Sequence[dict[str, Any]] = (),
    within: Sequence[Within] = (),
) -> dict[str, Path]:
    """Write ``evaluation.json``, ``evaluation.csv`` and the pictures, whose places are given back by name.

    Rows of ``--cache-aware`` and ``--memory`` become a CSV and a picture each, and are in the JSON.
    """
    drawn = figures(evaluations)
    if priced:
        drawn["cache_aware"] = png(price_figure(priced))
        about = {**about, "cache_aware": list(priced)}
    if within:
        drawn["memory"] = png(memory_figure(within, rows_of(within)))
        about = {**about, "memory": rows_of(within)}
    texts = {"evaluation.json": to_json(evaluations, about), "evaluation.csv": to_csv(evaluations)}
    folder.mkdir(parents=True, exist_ok=True)
    for name in (CACHE_AWARE, WITHIN):
        (folder / name).unlink(missing_ok=True)  # of another evaluation
    if within:
        texts[WITHIN] = csv_text(rows_of(within))
    if priced:
        texts[CACHE_AWARE] = csv_text(priced)
    for name, text in texts.items():
        write_atomically(folder / name, text)
    return write_pictures(folder, drawn, NAMES)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options, without those that could only fail after the models have run."""
    options = parser().parse_args(argv)
    for name in (
        "segment_lengths",
        "cache_ratios",
        "domains",
        "cache_aware",
        "memory",
    ):  # with spaces or commas between them
        given = getattr(options, name)
        setattr(options, name, None if given is None else list(chain.from_iterable(given)))
    if not options.models and not options.trace:
        raise ValueError("evaluate needs a MODEL or a --trace FILE, got neither")
    for name in ("domains", "memory"):
        if getattr(options, name) == []:
            raise ValueError(f"--{name} must have at least one value, got none")
    if options.save_trace is not None and len(options.models) != 1:
        raise ValueError(f"--save-trace keeps the routing of one MODEL, got {len(options.models)}")
    check_segment_lengths(options.segment_lengths)
    for name, least in (("max_tokens", 2), ("sequence_length", 2), ("batch_size", 1), ("corpus_bytes", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if options.replicates < 0:
        raise ValueError(f"--replicates must be 0 or more, got {options.replicates}")
    if not options.cache_ratios or not all(0 < ratio < math.inf for ratio in options.cache_ratios):
        raise ValueError(f"--cache-ratios must be positive numbers, got {options.cache_ratios}")
    if options.cache_aware is not None:
        _check_cache_aware(options)
    options.within = _device_within(options)
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"--out must be a folder, got the file {options.out}")
    check_writable("--out", options.out)
    if options.save_trace is not None:
        check_writable("the folder of --save-trace", options.save_trace.parent)
    if options.save_trace is not None and options.save_trace.is_dir():
        raise ValueError(f"--save-trace must be a file, got the folder {options.save_trace}")
    return options


def within_memory(evaluations: Sequence[Evaluation], options: argparse.Namespace) -> Iterator[Within]:
    """Yield each model on the device of ``--memory``; what the evaluation found is not lost where one has no bytes."""
    for one in evaluations:
        try:
            yield Within(one.recording, options.within, _device(options.device))
        except ValueError as error:
            print(f"{one.recording.model} is left out: {error}")


def rows_of(within: Sequence[Within]) -> list[dict[str, Any]]:
    """Return the rows of every model."""
    return [row for one in within for row in one.rows()]


def _device_within(options: argparse.Namespace) -> Device | None:
    """Return the device of ``--memory``; ValueError for options that are missing or that cannot be."""
    of_device = ("compute_ms", "bytes_per_weight", "context", "dense_memory")
    if options.memory is None or options.read_bandwidth is None:
        given = [name for name in ("memory", "read_bandwidth", *of_device) if getattr(options, name) is not None]
        if given:
            shown = ", ".join("--" + name.replace("_", "-") for name in given)
            raise ValueError(f"--memory and --read-bandwidth go together, got {shown} alone")
        return None
    for name in of_device[:3]:
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} must be a positive number, got {value}")
    return Device(
        memory=[parse_bytes(size, "--memory") for size in options.memory],
        bandwidth=parse_bandwidth(options.read_bandwidth, "--read-bandwidth"),
        compute_seconds=None if options.compute_ms is None else options.compute_ms / 1e3,
        bytes_per_weight=options.bytes_per_weight,
        context=options.context,
        dense_bytes=None if options.dense_memory is None else parse_bytes(options.dense_memory, "--dense-memory"),
    )


def _check_cache_aware(options: argparse.Namespace) -> None:
    """Raise ValueError where cache-aware routing could only be refused after the models have run."""
    if not options.models:
        raise ValueError("--cache-aware needs a MODEL to run, got saved routing alone")
    check_strengths(options.cache_aware, options.method)
    if min(options.cache_ratios) < 1:
        raise ValueError(f"--cache-ratios must be at least 1 for --cache-aware, got {options.cache_ratios}")


def _documents(options: argparse.Namespace) -> dict[str, datasets.Dataset]:
    """Return the text of each domain."""
    domains = list(DOMAINS) if options.domains is None and not options.data else options.domains or []
    documents: dict[str, datasets.Dataset] = dict(corpus_documents(domains, options.corpus_bytes))
    for path in options.data:
        name = Path(path).stem if Path(path).is_file() else path
        if name in documents:
            raise ValueError(f"--data and --domains must name each domain once, got {name!r} again")
        documents[name] = dataset_documents(path, options.data_config, options.split, options.text_column)
    return {name: sampled(found, options.seed) for name, found in documents.items()}


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name} needs a CUDA device, and torch finds none here")
    return device


def _sequence_length(candidate: Candidate, wanted: int | None) -> int:
    context = candidate.context or wanted or SEQUENCE_LENGTH
    if wanted is not None and wanted > context:
        raise ValueError(f"--sequence-length must be at most {context}, the context of {candidate.name}, got {wanted}")
    return wanted or min(SEQUENCE_LENGTH, context)
