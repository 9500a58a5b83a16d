"""``consistency-reg cloze``: which of four continuations is a passage's own, on held-out text of every domain."""

import argparse
import csv
import shlex
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from consistency_reg.lab.arguments.cloze import parser
from consistency_reg.lab.cloze.answers import answered, mean_and_error
from consistency_reg.lab.cloze.items import Item, make_items
from consistency_reg.lab.evaluate.models import Candidate, load
from consistency_reg.lab.evaluate.text import corpus_documents
from consistency_reg.lab.files import csv_text, write_atomically
from consistency_reg.lab.pricing.rows import origin
from consistency_reg.lab.pricing.strengths import check_strengths
from consistency_reg.lab.render.outputs import check_writable
from consistency_reg.lab.render.table import Table, percent, points
from consistency_reg.lab.render.terminal import print_tables
from consistency_reg.lab.upcycle.smollm import place_of
from consistency_reg.measures import CLOZE
from consistency_reg.optional import require
from consistency_reg.rerouting import CacheAwareRouting

with require("transformers"):
    import datasets

Row = dict[str, Any]
Questions = dict[str, list[Item]]  # by domain
NOTE = "the standard error is that of the mean; the difference is with the first row, question by question"


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``consistency-reg cloze``: print a row for each model and strength, and add them to a CSV."""
    options = _options(argv)
    made = origin(shlex.join(["consistency-reg", "cloze", *(argv or ())]), options.device)
    documents = corpus_documents(options.domains, options.corpus_bytes)
    first: tuple[Questions, Tensor] | None = None
    rows: list[Row] = []
    for place in options.models:
        candidate = load(place_of(place), device=torch.device(options.device), dtype=options.dtype)
        questions = _questions(candidate, documents, options)
        for strength, right in _answers(candidate, questions, options):
            first = first or (questions, right)
            compared = right - first[1] if questions == first[0] else None
            rows.append(_row(candidate.name, strength, questions, right, compared, options) | made)
            if options.csv is not None:
                _add(options.csv, rows[-1])
    print_tables([_table(rows)])
    return 0


def _questions(candidate: Candidate, documents: dict[str, datasets.Dataset], options: argparse.Namespace) -> Questions:
    length = options.passage + options.continuation
    if candidate.context is not None and length > candidate.context:
        raise ValueError(f"{candidate.name} reads {candidate.context} tokens, but a question has {length}")
    if not candidate.predicts:
        raise ValueError(f"{candidate.name} must be a causal model with its head, and is none")
    found = {}
    for domain, texts in documents.items():
        ids = candidate.encode([text for text in texts["text"] if text])
        try:
            found[domain] = make_items(ids, options.items, options.passage, options.continuation, seed=options.seed)
        except ValueError as error:
            raise ValueError(f"domain {domain!r}: {error}") from error
    return found


def _answers(candidate: Candidate, questions: Questions, options: argparse.Namespace) -> Iterator[tuple[float, Tensor]]:
    """Yield each strength with whether every question, one domain after the other, was answered rightly."""
    for strength in options.cache_aware:
        routing = CacheAwareRouting(candidate.model, options.cache_ratio, strength) if strength else nullcontext()
        with routing:
            yield strength, torch.cat([answered(candidate.model, items) for items in questions.values()])


def _row(
    model: str, strength: float, questions: Questions, right: Tensor, compared: Tensor | None, options: Any
) -> Row:
    accuracy, error = mean_and_error(right)
    difference = (None, None) if compared is None else mean_and_error(compared)
    of_domains = right.split(options.items)
    return {
        "model": model,
        "strength": strength,
        "cache_ratio": options.cache_ratio if strength else "",
        "items": len(right),
        "passage": options.passage,
        "continuation": options.continuation,
        "questions_seed": options.seed,
        CLOZE.at().name: accuracy,
        "standard_error": error,
        "difference": difference[0],
        "difference_standard_error": difference[1],
        **{f"{CLOZE.at().name}/{name}": float(part.mean()) for name, part in zip(questions, of_domains, strict=True)},
    }


def _table(rows: Sequence[Row]) -> Table:
    header = ["model", "strength", "questions", f"{CLOZE.label} (%)", "standard error", "difference", "its error"]
    cells = [
        [
            row["model"],
            f"{row['strength']:g}",
            str(row["items"]),
            percent(row[CLOZE.at().name]),
            percent(row["standard_error"]),
            "" if row["difference"] is None else points(row["difference"]),
            "" if row["difference"] is None else percent(row["difference_standard_error"]),
        ]
        for row in rows
    ]
    return Table("Which of four continuations is a passage's own", header, cells, NOTE)


def _add(path: Path, row: Row) -> None:
    """Add a row to a CSV file, whole or not at all; columns that one side lacks are empty there."""
    kept: list[dict[str, Any]] = []
    if path.exists():
        with path.open(encoding="utf-8", newline="") as file:
            kept = list(csv.DictReader(file))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, csv_text([*kept, row]))


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options, without those that could only be refused after a model has been read."""
    options = parser().parse_args(argv)
    for name in ("items", "passage", "continuation"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(options, name)}")
    check_strengths(options.cache_aware)
    if not options.cache_ratio >= 1:
        raise ValueError(f"--cache-ratio must be at least 1, got {options.cache_ratio}")
    if options.csv is not None:
        if options.csv.is_dir():
            raise ValueError(f"--csv must be a file such as {options.csv / 'cloze.csv'}, got the folder {options.csv}")
        check_writable("the folder of --csv", options.csv.parent)
    return options
