"""Choose the text that a model is judged on: rows of token ids, each a piece of one document."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from consistency_reg.lab.corpus.sources import CHAT, TEXT, local_source
from consistency_reg.lab.corpus.text import load_domain
from consistency_reg.optional import require

with require("transformers"):
    import datasets

ENCODED_AT_ONCE = 64  # documents
FEW_DOCUMENTS = 8  # of a domain, which one odd document among them can tilt

Rows = list[list[int]]
Document = str | list[dict[str, Any]]  # text, or a chat: a list of {"role", "content"}
Documents = Iterable[Mapping[str, Document]]  # {"text": ...} or {"messages": ...}


def corpus_documents(domains: Sequence[str], corpus_bytes: int) -> dict[str, datasets.Dataset]:
    """Return the validation documents of domains of the default corpus, those whose packages are installed.

    Raises:
        ValueError: an unknown domain, or none of them can be read.
    """
    texts = {name: load_domain(name, corpus_bytes) for name in domains}
    found = {name: text.validation for name, text in texts.items() if text is not None}
    if domains and not found:
        raise ValueError(f"none of the domains {list(domains)} can be read: see the warnings above")
    return found


def dataset_documents(path: str, config: str | None, split: str, text_column: str) -> datasets.Dataset:
    """Return the documents, text or chats, of a data set of the hub, a folder, or a file (JSON, CSV, Parquet, text).

    Raises:
        ValueError: ``text_column`` is no column of strings or chats; no such split.
        OSError: no such data set.
    """
    source = local_source(path, name=config, split=split, validation_split=split, text_column=text_column)
    return source.load().train


def sampled(documents: datasets.Dataset, seed: int) -> datasets.Dataset:
    """Return the documents in a random order that the seed decides: files are often sorted by kind."""
    return documents.shuffle(seed=seed)


def cut(
    domains: Mapping[str, Documents],
    encode: Callable[[list[Document]], Rows],
    length: int,
    max_tokens: int,
) -> dict[str, Rows]:
    """Cut documents into rows of at most ``length`` tokens, ``max_tokens`` in all, the domains' shares equal.

    Of each document its first row is taken; where this is not enough text, the rest of the documents too. A row of a
    single token is left out: nothing follows it.

    Args:
        domains: the documents of each domain, in the order in which they are taken.
        encode: from documents to token ids.
        length: T.
        max_tokens: of all domains together; a domain with less text does not leave its share to others.

    Raises:
        ValueError: a domain without text.

    Warns:
        UserWarning: a domain of which few documents decide.
    """
    share = max_tokens // len(domains)
    taken = {name: _rows(_encoded(documents, encode), length, share) for name, documents in domains.items()}
    rows = {name: found for name, (found, _) in taken.items()}
    if few := {name: documents for name, (_, documents) in taken.items() if 0 < documents < FEW_DOCUMENTS}:
        found = ", ".join(f"{name} ({documents})" for name, documents in few.items())
        warnings.warn(
            f"fewer than {FEW_DOCUMENTS} documents decide what is measured of {found}: give more or shorter documents, "
            "or more --max-tokens",
            stacklevel=2,
        )
    if empty := [name for name, found in rows.items() if not found]:
        raise ValueError(f"the data must hold at least one document of two tokens, got none in {', '.join(empty)}")
    return rows


def _encoded(documents: Documents, encode: Callable[[list[Document]], Rows]) -> Iterator[list[int]]:
    found = (row[TEXT] if TEXT in row else row[CHAT] for row in documents)
    present = (document for document in found if document and not (isinstance(document, str) and document.isspace()))
    while batch := list(islice(present, ENCODED_AT_ONCE)):
        yield from encode(batch)


def _rows(documents: Iterable[list[int]], length: int, max_tokens: int) -> tuple[Rows, int]:
    """Return the rows, and from how many documents they come."""
    first: Rows = []
    rest: Rows = []
    left = max_tokens
    for ids in documents:
        pieces = [ids[start : start + length] for start in range(0, len(ids), length) if start + 1 < len(ids)]
        first += pieces[:1]
        rest += pieces[1:]
        left -= len(pieces[0]) if pieces else 0
        if left <= 0:
            break
    rows, left = [], max_tokens
    for row in (*first, *rest):
        if left < 2:
            break
        rows.append(row[:left])
        left -= len(rows[-1])
    return rows, min(len(first), len(rows))
