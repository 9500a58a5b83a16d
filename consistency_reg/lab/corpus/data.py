"""Feed language models with packed rows of several domains, as a LightningDataModule."""

import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from consistency_reg.lab.corpus.packing import MixedRows, PackedRows, ResumableLoader
from consistency_reg.lab.corpus.sources import DataSource, Text
from consistency_reg.lab.corpus.text import DOMAINS, load_domain
from consistency_reg.lab.corpus.tokens import (
    PreTrainedTokenizerFast,
    TokenizedText,
    Tokens,
    load_tokenizer,
    tokenize,
    train_tokenizer,
)
from consistency_reg.lab.files import check_name
from consistency_reg.optional import require

with require("lightning"):
    from lightning.pytorch import LightningDataModule
    from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
    from tqdm import tqdm

SEPARATES_DOCUMENTS = ("eager", "sdpa")


class TextDataModule(LightningDataModule):
    """Serves rows of packed text: in training the domains mixed evenly, in validation a dataloader for each domain.

    What is seen, and in what order, depends on the arguments alone: not on the model, the number of workers or that of
    processes (P processes with batches of B see what one sees with P * B). A run that is resumed from a checkpoint
    goes on with the batch at which it stopped. For the items see
    :class:`~consistency_reg.lab.corpus.packing.PackedRows`.

    Args:
        domains: names of the default corpus (:data:`~consistency_reg.lab.corpus.text.DOMAINS`); all of them when
            neither this nor ``data`` is given.
        data: other text, a :class:`~consistency_reg.lab.corpus.sources.DataSource` or its fields as a dict for each
            domain.
        sequence_length: T, tokens of a row.
        batch_size: rows of a batch, for each process.
        vocab_size: how many ids a model is to know, and the byte-level BPE gets that is trained on the train split.
        tokenizer: a folder or hub id of a tokenizer to take instead; it may not have more than ``vocab_size`` ids.
        validation_tokens: tokens of each domain in validation, whole rows drawn from all over its validation split.
        corpus_bytes: bytes of text for each domain of the default corpus, train and validation together.
        seed: the order of training. It changes neither text nor tokenizer nor validation.
        num_workers: processes that make batches beside the training process.
        cache_dir: where text, tokenizer and ids are kept; $CONSISTENCY_REG_CACHE or ~/.cache/consistency_reg when None.

    After ``setup``, ``domains`` are those that could be read, in the order of the validation dataloaders and of an
    item's ``domain``; there are ``tokenizer``, ``texts`` (each domain's tokens and bytes per token) and
    ``corpus_sha256``, which is also among the hyperparameters that Lightning logs.

    Raises:
        ValueError: an argument out of range, an unknown domain (in the constructor); a domain without a single token to
            predict, less text than one batch (in ``setup`` and ``train_dataloader``).
        OSError: the cache cannot be written (in ``prepare_data``).

    Example:
        >>> TextDataModule(domains=["cpp", "cooking"])  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: domains must be among [...], got ['cooking']
    """

    def __init__(
        self,
        domains: list[str] | None = None,
        data: dict[str, DataSource] | None = None,
        sequence_length: int = 256,
        batch_size: int = 8,
        vocab_size: int = 4096,
        tokenizer: str | None = None,
        validation_tokens: int = 16_384,
        corpus_bytes: int = 4_500_000,
        seed: int = 0,
        num_workers: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        self.texts: dict[str, TokenizedText] = {}
        self.sources = {check_name("a domain", name): _source(name, source) for name, source in (data or {}).items()}
        self.corpus_domains = list(DOMAINS) if domains is None and not data else list(domains or ())
        if unknown := [name for name in self.corpus_domains if name not in DOMAINS]:
            raise ValueError(f"domains must be among {list(DOMAINS)}, got {unknown}")
        if not self.domains:
            raise ValueError("domains must name at least one domain, got none")
        if twice := {name for name in self.domains if self.domains.count(name) > 1}:
            raise ValueError(f"domains and data must name each domain once, got {sorted(twice)} again")
        for argument, value, least in (
            ("sequence_length", sequence_length, 2),
            ("batch_size", batch_size, 1),
            ("validation_tokens", validation_tokens, sequence_length),
            ("corpus_bytes", corpus_bytes, 1),
            ("seed", seed, 0),
            ("num_workers", num_workers, 0),
        ):
            if value < least:
                raise ValueError(f"{argument} must be at least {least}, got {value}")
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.validation_tokens = validation_tokens
        self.corpus_bytes = corpus_bytes
        self.seed = seed
        self.num_workers = num_workers
        self.cache_dir = cache_dir
        self.vocab_size = vocab_size
        self.tokenizer = None if tokenizer is None else load_tokenizer(tokenizer)
        if self.tokenizer is not None and len(self.tokenizer) > vocab_size:
            raise ValueError(
                f"vocab_size must be at least {len(self.tokenizer)} for tokenizer={tokenizer!r}, got {vocab_size}"
            )

    @property
    def domains(self) -> list[str]:
        """Return the domains that were asked for, and after ``setup`` those that could be read."""
        return list(self.texts) or [*self.corpus_domains, *self.sources]

    @property
    def corpus_sha256(self) -> dict[str, str]:
        """Return the SHA-256 of the text of each domain."""
        return {name: text.sha256 for name, text in self.texts.items()}

    def prepare_data(self) -> None:
        """Read, tokenize and keep all text, unless the cache has it; print what it is."""
        if self.texts:
            return
        _, texts = self._load()
        for name, text in texts.items():
            splits = (("train", text.train), ("validation", text.validation))
            sizes = ", ".join(f"{use} {t.text_bytes / 1e6:.2f} MB in {len(t.starts)} documents" for use, t in splits)
            rank_zero_info(f"{name}: {sizes}, {text.train.bytes_per_token:.2f} bytes/token, sha256 {text.sha256}")

    def setup(self, stage: str | None = None) -> None:
        """Map the text from the cache, and refuse text that a model could learn nothing from."""
        if self.texts:
            return
        self.tokenizer, texts = self._load()
        for name, text in texts.items():
            for use, tokens in (("train", text.train), ("validation", text.validation)):
                if PackedRows(tokens, self.sequence_length).predicted_tokens == 0:
                    raise ValueError(
                        f"the {use} text of domain {name!r} has no token to predict:"
                        f" its {len(tokens.starts)} documents hold {len(tokens.ids)} tokens, so all labels are masked"
                    )
        self.texts = texts
        self.save_hyperparameters({"corpus_sha256": self.corpus_sha256})

    def check_batches(self, world_size: int) -> None:
        """Raise ValueError if there are not enough rows for one batch of each of ``world_size`` processes."""
        rows = [len(self._rows(index, text.train)) for index, text in enumerate(self.texts.values())]
        given = len(MixedRows(rows, world_size=world_size))
        if given < self.batch_size:
            raise ValueError(
                f"batch_size must be at most {given}, the rows of {self.sequence_length} tokens that there are for"
                f" each process, got {self.batch_size}"
            )

    def train_dataloader(self) -> ResumableLoader:
        """Return a loader of the domains mixed evenly; its state is in Lightning's checkpoints."""
        rows = [self._rows(index, text.train) for index, text in enumerate(self.texts.values())]
        rank, world_size = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        order = MixedRows(list(map(len, rows)), seed=self.seed, rank=rank, world_size=world_size)
        self.check_batches(world_size)
        loader = ResumableLoader(ConcatDataset(rows), sampler=order, drop_last=True, **self._loading())
        loader.unfinished = self._unfinished
        return loader

    def val_dataloader(self) -> list[DataLoader]:
        """Return a loader for each of ``domains``; its rows are the same in every run, whatever the seed."""
        return [
            DataLoader(self._validation_rows(name, self._rows(index, text.validation)), **self._loading())
            for index, (name, text) in enumerate(self.texts.items())
        ]

    def _load(self) -> tuple[PreTrainedTokenizerFast, dict[str, TokenizedText]]:
        steps = tqdm(
            total=2 * (len(self.corpus_domains) + len(self.sources)) + 1, unit="step", disable=None, leave=False
        )
        with steps:
            texts: dict[str, Text] = {}
            for name in self.corpus_domains:
                steps.set_description(f"reading {name}")
                if (text := load_domain(name, self.corpus_bytes, cache_dir=self.cache_dir)) is not None:
                    texts[name] = text
                steps.update()
            for name, source in self.sources.items():
                steps.set_description(f"reading {name}")
                texts[name] = source.load()
                steps.update()
            if not texts:
                raise ValueError(f"none of the domains {self.corpus_domains} can be read: see the warnings above")
            steps.set_description("training the tokenizer")
            tokenizer = self.tokenizer or train_tokenizer(texts, self.vocab_size, cache_dir=self.cache_dir)
            steps.update()
            tokenized = {}
            for name, text in texts.items():
                steps.set_description(f"tokenizing {name}")
                tokenized[name] = tokenize(text, tokenizer, name=name, cache_dir=self.cache_dir)
                steps.update()
        return tokenizer, tokenized

    def _rows(self, domain: int, tokens: Tokens) -> PackedRows:
        assert self.tokenizer is not None
        pad_id = self.tokenizer.pad_token_id
        return PackedRows(tokens, self.sequence_length, domain=domain, pad_id=0 if pad_id is None else pad_id)

    def _validation_rows(self, name: str, rows: PackedRows) -> Dataset:
        wanted = self.validation_tokens // self.sequence_length
        if rows.whole_rows < wanted:
            rank_zero_warn(
                f"domain {name!r} has {len(rows.tokens.ids)} tokens for validation, fewer than"
                f" validation_tokens={self.validation_tokens}: all of them are used"
            )
            return rows
        # from all over the split, not its first documents, which may be few and long
        return Subset(rows, sorted(np.random.default_rng(0).permutation(rows.whole_rows)[:wanted].tolist()))

    def _unfinished(self) -> int:
        """Return how many batches are under way: a checkpoint written when a step fails is not to count its batch."""
        if self.trainer is None:
            return 0
        batches = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return batches.ready - batches.processed  # type: ignore[attr-defined]

    def _loading(self) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
            "worker_init_fn": _out_of_signals,
            "pin_memory": torch.cuda.is_available(),
            "generator": torch.Generator(),  # else each pass draws from the global one, and the model's dropout with it
        }


def model_inputs(batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the arguments with which a causal model of transformers keeps documents apart: ``model(**inputs)``.

    The models make their mask block-diagonal where ``position_ids`` begin anew in a row, but only if they get neither
    an ``attention_mask`` nor a cache (``transformers.masking_utils``). Hence no mask, and no cache, which is their
    default. Padding needs none: it ends a row, where causal attention hides it from real tokens, and has no labels.

    True of the implementations of attention that :func:`check_attention` lets pass.
    """
    given = {name: batch[name] for name in ("input_ids", "position_ids", "labels") if name in batch}
    return {**given, "use_cache": False}


def check_attention(model: Any) -> None:
    """Raise ValueError if a model of transformers would attend across the documents of a row.

    Flash attention looks at ``position_ids`` only if there is one row, and says nothing if there are more.
    """
    implementation = model.config._attn_implementation
    if implementation not in SEPARATES_DOCUMENTS:
        raise ValueError(
            f"attn_implementation must be one of {SEPARATES_DOCUMENTS} to keep documents apart, got {implementation!r}"
        )


def _out_of_signals(worker: int) -> None:
    """Give a worker a process group of its own: a signal to the run's would kill it, and with it the step at work."""
    os.setpgid(0, 0)


def _source(name: str, source: DataSource | dict[str, Any]) -> DataSource:
    if isinstance(source, DataSource):
        return source
    known = [field.name for field in fields(DataSource)]
    if not isinstance(source, Mapping) or "path" not in source or set(source) - set(known):
        raise ValueError(f"data[{name!r}] must have the key 'path' and may have others of {known}, got {source!r}")
    return DataSource(**source)
