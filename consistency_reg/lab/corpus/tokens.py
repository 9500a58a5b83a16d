"""From text to token ids: a byte-level BPE trained on the spot or somebody's tokenizer, and the ids on disk."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from consistency_reg.lab.corpus.disk_cache import cache_key, cache_root, cached
from consistency_reg.lab.corpus.sources import CHAT, TEXT, Text
from consistency_reg.lab.files import check_name
from consistency_reg.optional import require

with require("transformers"):
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

START, PAD = "<|endoftext|>", "<|pad|>"  # ids 0 and 1 of a tokenizer trained here
SMALLEST_VOCABULARY = 256 + 2  # every byte, and these two
TRAINING_CHARACTERS = 1_000_000  # of each domain: more make a vocabulary of this size hardly better, and slower
NO_TEMPLATE = (
    "the data of {} are chats, which need a tokenizer with a chat template: fine-tune a model that has one, or name a "
    "tokenizer with one, data.tokenizer"
)
CHUNK = 256  # documents that are encoded at once
Encode = Callable[[Mapping[str, list[Any]]], Iterator[tuple[str, list[int]]]]  # documents -> each one's text and ids


@dataclass(frozen=True)
class Tokens:
    """One split of one domain. A document is its start token, if the tokenizer has one, and its text.

    Attributes:
        ids: [N] the documents one after the other, mapped from disk.
        starts: [documents] where in ``ids`` each begins.
        text_bytes: UTF-8 bytes of the text.
        text_tokens: ids without the start tokens.
    """

    ids: np.ndarray
    starts: np.ndarray
    text_bytes: int
    text_tokens: int

    @property
    def bytes_per_token(self) -> float:
        """Divide a cross-entropy in bits per token by this to get bits per byte."""
        return self.text_bytes / max(self.text_tokens, 1)


@dataclass(frozen=True)
class TokenizedText:
    """One domain. ``sha256`` is that of its text: equal digests, equal train and validation documents."""

    train: Tokens
    validation: Tokens
    sha256: str


def train_tokenizer(
    texts: Mapping[str, Text], vocab_size: int, *, cache_dir: str | Path | None = None
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of at most ``vocab_size`` ids (fewer if the text is short) on each domain's train split.

    Raises:
        ValueError: ``vocab_size`` does not hold all bytes, or a domain holds chats.
        OSError: the cache cannot be written.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"vocab_size must be at least {SMALLEST_VOCABULARY}, all bytes and two special tokens, got {vocab_size}"
        )

    def build(draft: Path) -> None:
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[START, PAD],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(_training_documents(texts), trainer)
        (draft / "tokenizer.json").write_text(tokenizer.to_str())

    if chats := [name for name, text in texts.items() if text.is_chat]:
        raise ValueError(NO_TEMPLATE.format(", ".join(chats)))
    keys = [text.key for text in texts.values()]
    key = cache_key(text=keys, vocab_size=vocab_size, version=tokenizers.__version__, code=Path(__file__).read_text())
    folder = cached(cache_root(cache_dir) / "tokenizer" / f"bpe-{vocab_size}-{key}", build)
    return PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token=START, eos_token=START, pad_token=PAD
    )


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerFast:
    """Return somebody's tokenizer, from the hub or a folder.

    Raises:
        ValueError: it is not of the `tokenizers` library, or runs code of its own.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"tokenizer {name_or_path!r} runs code of its own, which is not run here: name another, data.tokenizer"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"tokenizer must be one of the `tokenizers` library, got {type(tokenizer).__name__}")
    return tokenizer


def tokenize(
    text: Text, tokenizer: PreTrainedTokenizerFast, *, name: str = "text", cache_dir: str | Path | None = None
) -> TokenizedText:
    """Return the token ids of a domain, made once and then mapped from disk.

    Special tokens that are spelt out in text are text; a chat becomes what the tokenizer's template makes of it.
    Documents without any text are left out.

    Raises:
        ValueError: ``name``, which becomes part of a folder's name, may not be one; chats without a template.
        OSError: the cache cannot be written.
    """
    check_name("a domain", name)
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    adds_start = start is not None and not text.is_chat  # a template begins a chat as it wants to
    template = check_template(name, tokenizer) if text.is_chat else None
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)

    def build(draft: Path) -> None:
        encode = _chats(tokenizer) if text.is_chat else _strings(tokenizer, [start] if start is not None else [])
        digest = hashlib.sha256()
        counts = {}
        for split, documents in (("train", text.train), ("validation", text.validation)):
            starts, total, text_bytes = [], 0, 0
            with open(draft / f"{split}.ids", "wb") as file:
                for batch in documents.iter(CHUNK):
                    for string, ids in encode(batch):
                        encoded = string.encode()
                        digest.update(f"{split} {len(encoded)} ".encode() + encoded)
                        text_bytes += len(encoded)
                        starts.append(total)
                        total += len(ids)
                        file.write(np.array(ids, dtype).tobytes())
            np.save(draft / f"{split}.starts.npy", np.array(starts, np.int64))
            text_tokens = total - (len(starts) if adds_start else 0)
            counts[split] = {"text_bytes": text_bytes, "text_tokens": text_tokens}
        (draft / "text.json").write_text(json.dumps({"sha256": digest.hexdigest(), **counts}))

    # all that makes ids of text, not the vocabulary alone; build turns the last two off
    pipeline = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    encoding = cache_key(pipeline=pipeline, start=start, template=template, version=tokenizers.__version__)
    key = cache_key(text=text.key, tokenizer=encoding, code=Path(__file__).read_text())
    folder = cached(cache_root(cache_dir) / "tokens" / f"{name}-{key}", build)
    about = json.loads((folder / "text.json").read_text())
    train, validation = (_read(folder, split, dtype, **about[split]) for split in ("train", "validation"))
    return TokenizedText(train, validation, about["sha256"])


def check_template(name: str, tokenizer: PreTrainedTokenizerFast) -> str:
    """Return a tokenizer's chat template; ValueError if it has none."""
    if not tokenizer.chat_template:
        raise ValueError(NO_TEMPLATE.format(name))
    return str(tokenizer.chat_template)


def _strings(tokenizer: PreTrainedTokenizerFast, start: list[int]) -> Encode:
    """Encode documents of plain text, in which special tokens that are spelt out are text."""
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())  # a copy, its options are ours
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    encode = backend.encode_batch_fast  # without the offsets that a transformers call computes as well

    def encoded(batch: Mapping[str, list[Any]]) -> Iterator[tuple[str, list[int]]]:
        strings = [string for string in batch[TEXT] if string]
        for string, encoding in zip(strings, encode(strings, add_special_tokens=False), strict=True):
            yield string, [*start, *encoding.ids]

    return encoded


def _chats(tokenizer: PreTrainedTokenizerFast) -> Encode:
    """Encode chats as the tokenizer's template writes them, special tokens included."""

    def encoded(batch: Mapping[str, list[Any]]) -> Iterator[tuple[str, list[int]]]:
        for messages in batch[CHAT]:
            if messages:
                string = str(tokenizer.apply_chat_template(messages, tokenize=False))
                yield string, tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"]

    return encoded


def _read(folder: Path, split: str, dtype: np.dtype, text_bytes: int, text_tokens: int) -> Tokens:
    file = folder / f"{split}.ids"
    ids = np.memmap(file, dtype, mode="r") if file.stat().st_size else np.empty(0, dtype)  # nothing cannot be mapped
    return Tokens(ids, np.load(folder / f"{split}.starts.npy"), text_bytes, text_tokens)


def _training_documents(texts: Mapping[str, Text]) -> Iterator[str]:
    for text in texts.values():
        left = TRAINING_CHARACTERS
        for row in text.train:
            if document := row["text"]:
                yield document[:left]
                left -= len(document)
            if left <= 0:
                break
