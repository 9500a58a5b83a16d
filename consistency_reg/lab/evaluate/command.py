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

from consistency_reg.functional.cache_aware import check_cache_aware
from consistency_reg.functional.segments import check_segment_lengths
from consistency_reg.lab.arguments.evaluate import SEQUENCE_LENGTH, parser
from consistency_reg.lab.corpus.text import DOMAINS
from consistency_reg.lab.evaluate.cache_aware import priced as price_on
from consistency_reg.lab.evaluate.figures import NAMES, figures
from consistency_reg.lab.evaluate.measure import Evaluation, measure
from consistency_reg.lab.evaluate.models import Candidate, load
from consistency_reg.lab.evaluate.records import to_csv, to_json
from consistency_reg.lab.evaluate.run import record
from consistency_reg.lab.evaluate.tables import tables
from consistency_reg.lab.evaluate.text import corpus_documents, cut, dataset_documents, sampled
from consistency_reg.lab.evaluate.traces import Recording, load_trace, save_trace
from consistency_reg.lab.evaluate.tracking import log_to_wandb
from consistency_reg.lab.evaluate.verdict import verdict
from consistency_reg.lab.files import write_atomically
from consistency_reg.lab.pricing.rows import to_csv as price_csv
from consistency_reg.lab.pricing.show import figure as price_figure
from consistency_reg.lab.pricing.show import price_table
from consistency_reg.lab.provenance import git_commit, package_versions
from consistency_reg.lab.render.outputs import check_writable, write_pictures
from consistency_reg.lab.render.png import png
from consistency_reg.lab.render.terminal import print_tables, print_verdict
from consistency_reg.optional import require

with require("transformers"):
    import datasets

CACHE_AWARE = "cache_aware.csv"


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``consistency-reg evaluate``: tables on the terminal, JSON, CSV and PNGs in a folder."""
    options = _options(argv)
    about = {"git_commit": git_commit(), "versions": package_versions()}
    recordings = [load_trace(path) for path in options.trace]
    priced: list[dict[str, Any]] = []
    recordings += record_models(options, about, priced) if options.models else []
    evaluations = evaluate(recordings, options)
    print_tables([*tables(evaluations), *([price_table(priced)] if priced else [])])
    command = shlex.join(["consistency-reg", "evaluate", *(argv or ())])
    pictures = write(options.out, evaluations, {"command": command, **about}, priced)
    names = ["evaluation.json", "evaluation.csv", *([CACHE_AWARE] if priced else [])]
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
        }
        texts = cut(documents, candidate.encode, length, options.max_tokens)
        recording = record(candidate, texts, batch_size=options.batch_size, about={**about, **settings})
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
    folder: Path, evaluations: Sequence[Evaluation], about: dict[str, Any], priced: Sequence[dict[str, Any]] = ()
) -> dict[str, Path]:
    """Write ``evaluation.json``, ``evaluation.csv`` and the pictures, whose places are given back by name.

    Rows of ``--cache-aware`` become ``cache_aware.csv`` and a picture, and are in the JSON.
    """
    drawn = figures(evaluations)
    if priced:
        drawn["cache_aware"] = png(price_figure(priced))
        about = {**about, "cache_aware": list(priced)}
    texts = {"evaluation.json": to_json(evaluations, about), "evaluation.csv": to_csv(evaluations)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CACHE_AWARE).unlink(missing_ok=True)  # of another evaluation
    if priced:
        texts[CACHE_AWARE] = price_csv(priced)
    for name, text in texts.items():
        write_atomically(folder / name, text)
    return write_pictures(folder, drawn, NAMES)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options, without those that could only fail after the models have run."""
    options = parser().parse_args(argv)
    for name in ("segment_lengths", "cache_ratios", "domains", "cache_aware"):  # with spaces or commas between them
        given = getattr(options, name)
        setattr(options, name, None if given is None else list(chain.from_iterable(given)))
    if not options.models and not options.trace:
        raise ValueError("evaluate needs a MODEL or a --trace FILE, got neither")
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
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"--out must be a folder, got the file {options.out}")
    check_writable("--out", options.out)
    if options.save_trace is not None:
        check_writable("the folder of --save-trace", options.save_trace.parent)
    if options.save_trace is not None and options.save_trace.is_dir():
        raise ValueError(f"--save-trace must be a file, got the folder {options.save_trace}")
    return options


def _check_cache_aware(options: argparse.Namespace) -> None:
    """Raise ValueError where cache-aware routing could only be refused after the models have run."""
    if not options.models:
        raise ValueError("--cache-aware needs a MODEL to run, got saved routing alone")
    if not all(0 <= strength < math.inf for strength in options.cache_aware):
        raise ValueError(f"--cache-aware must be strengths of 0 or more, got {options.cache_aware}")
    if min(options.cache_ratios) < 1:
        raise ValueError(f"--cache-ratios must be at least 1 for --cache-aware, got {options.cache_ratios}")
    for strength in options.cache_aware:
        check_cache_aware(1, 1, 1, strength, 1, options.method)


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
