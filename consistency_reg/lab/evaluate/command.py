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

from consistency_reg.functional.segments import check_segment_lengths
from consistency_reg.lab.corpus.text import DOMAINS
from consistency_reg.lab.evaluate.figures import NAMES, figures
from consistency_reg.lab.evaluate.measure import Evaluation, measure
from consistency_reg.lab.evaluate.models import DTYPES, Candidate, load
from consistency_reg.lab.evaluate.records import to_csv, to_json
from consistency_reg.lab.evaluate.run import record
from consistency_reg.lab.evaluate.tables import tables
from consistency_reg.lab.evaluate.text import corpus_documents, cut, dataset_documents, sampled
from consistency_reg.lab.evaluate.traces import Recording, load_trace, save_trace
from consistency_reg.lab.evaluate.tracking import log_to_wandb
from consistency_reg.lab.evaluate.verdict import verdict
from consistency_reg.lab.files import write_atomically
from consistency_reg.lab.provenance import git_commit, package_versions
from consistency_reg.lab.render.outputs import check_writable, write_pictures
from consistency_reg.lab.render.terminal import print_tables, print_verdict
from consistency_reg.lab.usage import CommandParser
from consistency_reg.optional import require

with require("transformers"):
    import datasets

SEQUENCE_LENGTH = 512
EXAMPLE = """\
examples:
  consistency-reg evaluate runs/first                                         on the default corpus
  consistency-reg evaluate allenai/OLMoE-1B-7B-0924 --dtype bfloat16 --data my.jsonl
  consistency-reg evaluate --trace olmoe.safetensors --trace other.safetensors     saved routing
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``consistency-reg evaluate``: tables on the terminal, JSON, CSV and PNGs in a folder."""
    options = _options(argv)
    about = {"git_commit": git_commit(), "versions": package_versions()}
    recordings = [load_trace(path) for path in options.trace]
    recordings += record_models(options, about) if options.models else []
    evaluations = evaluate(recordings, options)
    print_tables(tables(evaluations))
    command = shlex.join(["consistency-reg", "evaluate", *(argv or ())])
    pictures = write(options.out, evaluations, {"command": command, **about})
    print(f"{options.out}: evaluation.json, evaluation.csv, {', '.join(path.name for path in pictures.values())}")
    if options.wandb is not None:
        log_to_wandb(options.wandb, evaluations, pictures, options.out)
    print_verdict(verdict(evaluations))
    return 0


def record_models(options: argparse.Namespace, about: dict[str, Any]) -> Iterator[Recording]:
    """Run one model after the other over the same documents."""
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


def write(folder: Path, evaluations: Sequence[Evaluation], about: dict[str, Any]) -> dict[str, Path]:
    """Write ``evaluation.json``, ``evaluation.csv`` and the pictures, whose places are given back by name."""
    drawn = figures(evaluations)
    texts = {"evaluation.json": to_json(evaluations, about), "evaluation.csv": to_csv(evaluations)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_atomically(folder / name, text)
    return write_pictures(folder, drawn, NAMES)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, without those that could only fail after the models have run."""
    options = _parser().parse_args(argv)
    for name in ("segment_lengths", "cache_ratios", "domains"):  # with spaces or commas between them
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
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"--out must be a folder, got the file {options.out}")
    check_writable("--out", options.out)
    if options.save_trace is not None:
        check_writable("the folder of --save-trace", options.save_trace.parent)
    if options.save_trace is not None and options.save_trace.is_dir():
        raise ValueError(f"--save-trace must be a file, got the folder {options.save_trace}")
    return options


def _documents(options: argparse.Namespace) -> dict[str, datasets.Dataset]:
    """The text of each domain."""
    domains = list(DOMAINS) if options.domains is None and not options.data else options.domains or []
    documents: dict[str, datasets.Dataset] = dict(corpus_documents(domains, options.corpus_bytes))
    for path in options.data:
        name = Path(path).stem if Path(path).is_file() else path
        if name in documents:
            raise ValueError(f"--data and --domains must name each domain once, got {name!r} again")
        documents[name] = dataset_documents(path, options.data_config, options.split, options.text_column)
    return {name: sampled(found, options.seed) for name, found in documents.items()}


def labelled(text: str) -> tuple[str, str]:
    """Split ``NAME=PLACE`` into a model's name and its place; the name is empty where only a place is given.

    Example:
        >>> labelled("before=runs/first"), labelled("runs/first"), labelled("runs/lr=3")
        (('before', 'runs/first'), ('', 'runs/first'), ('', 'runs/lr=3'))
    """
    name, equals, place = text.partition("=")
    return (name, place) if equals and place and "/" not in name and not Path(text).exists() else ("", text)


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


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "consistency-reg evaluate",
        description="Judge mixture-of-experts models by their routing, and say how large a cache of experts they need.",
        epilog=EXAMPLE,
    )
    parser.add_argument(
        "models", nargs="*", type=labelled, metavar="[NAME=]MODEL", help="folder, finished run, or hub id of a model"
    )
    parser.add_argument("--trace", action="append", type=Path, default=[], metavar="FILE", help="saved routing instead")
    parser.add_argument("--save-trace", type=Path, metavar="FILE", help="keep the routing of the MODEL")
    parser.add_argument("--out", type=Path, default=Path("evaluation"), metavar="DIR", help="default: evaluation")
    parser.add_argument("--domains", nargs="+", type=names, metavar="NAME", help=" ".join(DOMAINS))
    parser.add_argument("--data", action="append", default=[], metavar="PATH", help="data set of the hub, folder, file")
    parser.add_argument("--data-config", metavar="NAME", help="configuration of the data set")
    parser.add_argument("--split", default="train", metavar="NAME", help="such as test or train[:1%%]; default: train")
    parser.add_argument("--text-column", default="text", metavar="NAME", help="of the data set; default: text")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="which documents are drawn; default: 0")
    parser.add_argument("--max-tokens", type=int, default=131_072, metavar="N", help="of all domains; default: 131072")
    parser.add_argument(
        "--sequence-length", type=int, metavar="T", help=f"tokens read at once; default: {SEQUENCE_LENGTH}"
    )
    parser.add_argument(
        "--corpus-bytes", type=int, default=4_500_000, metavar="N", help="as in the recipe that trained the model"
    )
    parser.add_argument(
        "--device", default="auto", metavar="NAME", help="such as cpu or cuda:0; default: cuda if there is one"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", metavar="NAME", help=f"{', '.join(DTYPES)}; default: as saved"
    )
    parser.add_argument("--batch-size", type=int, metavar="B", help="rows to begin with; halved when memory runs out")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    parser.add_argument("--segment-lengths", nargs="+", type=integers, metavar="M", help="default: 4,16,64")
    parser.add_argument("--cache-ratios", nargs="+", type=numbers, metavar="RHO", help="slots / K; default: 1,2,3,4")
    parser.add_argument(
        "--no-shared-cache",
        dest="shared_cache",
        action="store_false",
        help="skip one cache for all layers: many layers",
    )
    parser.add_argument("--replicates", type=int, default=200, metavar="R", help="of the bootstrap; 0: no intervals")
    parser.add_argument("--wandb", nargs="?", const="consistency-reg", metavar="PROJECT", help="log to wandb too")
    parser.set_defaults(segment_lengths=[[4, 16, 64]], cache_ratios=[[1.0, 2.0, 3.0, 4.0]])
    return parser


def integers(text: str) -> list[int]:
    """Integers between commas."""
    return [int(value) for value in text.split(",") if value]


def numbers(text: str) -> list[float]:
    """Numbers between commas."""
    return [float(value) for value in text.split(",") if value]


def names(text: str) -> list[str]:
    """Names between commas."""
    return [value for value in text.split(",") if value]
