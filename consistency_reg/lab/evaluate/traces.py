"""The routing of one model on some text: compact in memory, and as a file that others can write too.

The file is safetensors. Its tensors, for N rows of T tokens and K active of E routed experts:

- ``expert_ids.0``, ``expert_ids.1``, ...: [N, T, K] for each layer, uint8 or a wider integer,
- ``valid``: [N, T] uint8, 1 for real tokens,
- ``domain_ids``: [N] integers, the domain of each row,
- ``document_ids``: [N, T] integers; optional, one document a row without,
- ``token_ids``: [N, T] integers, what the model read; optional, no vocabulary specialization without,
- ``decoder_token_ids``: [N, T] integers, what the decoder of an encoder-decoder read; optional.

Its metadata are ``format`` = "consistency_reg.routing", ``format_version`` = "1" and ``routing``, a JSON object with
the keys ``model``, ``num_experts`` and ``layer_names`` (one for each layer), ``domains`` (names), and optional ones:
``expert_bytes`` (bytes of one routed expert of each layer), ``text_loss`` (by domain, the summed loss in nats of the
predicted tokens and their number), ``sample_row`` and ``sample`` (a row's number, and its
first tokens as text) and ``about`` (versions and settings, as they were).
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from consistency_reg.lab.evaluate.foreign_traces import is_foreign, read_foreign
from consistency_reg.lab.files import write_atomically
from consistency_reg.optional import require
from consistency_reg.routing import RoutingTrace
from consistency_reg.routing.documents import document_positions

with require("transformers"):
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save

FORMAT, VERSION = "consistency_reg.routing", "1"
IN_METADATA = (
    "model",
    "num_experts",
    "layer_names",
    "domains",
    "expert_bytes",
    "text_loss",
    "sample_row",
    "sample",
    "about",
)
OF_TOKENS = ("document_ids", "token_ids", "decoder_token_ids")  # [N, T], optional
STACKS = ("encoder", "decoder")
MOST_BYTES = 2**40  # of one expert
CHUNK_ROWS = 1024  # in int64 at a time


@dataclass(frozen=True)
class Recording:
    """Holds the routing of every MoE layer on every row.

    Attributes:
        model: the model's name.
        expert_ids: [N, T, K] for each layer, in the smallest dtype that holds E (see :func:`compact`).
        num_experts: E of each layer.
        layer_names: of each layer.
        valid: [N, T] bool, True for real tokens.
        domain_ids: [N] int64.
        domains: their names.
        document_ids: [N, T] int64; one document a row when None.
        token_ids: [N, T] int64, what the model read, an encoder-decoder's encoder; None where that is not known.
        decoder_token_ids: [N, T] int64, what the decoder of an encoder-decoder read.
        expert_bytes: parameter bytes of one routed expert of each layer; None where that is not known.
        text_loss: by domain, the summed loss of the predicted tokens in nats, and how many they are; empty where that
            is not known.
        sample_row: a row to look at.
        sample: its first tokens as text; empty where they are not known.
        about: versions and settings.
    """

    model: str
    expert_ids: Sequence[Tensor]
    num_experts: Sequence[int]
    layer_names: Sequence[str]
    valid: Tensor
    domain_ids: Tensor
    domains: Sequence[str]
    document_ids: Tensor | None = None
    token_ids: Tensor | None = None
    decoder_token_ids: Tensor | None = None
    expert_bytes: Sequence[int] | None = None
    text_loss: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    sample_row: int = 0
    sample: Sequence[str] = ()
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Return the number of real tokens of all rows."""
        return int(self.valid.sum())

    def perplexity(self, domain: str | None = None) -> float | None:
        """Return the perplexity of a domain, of the whole text when None; None where the loss is not known."""
        losses = [found for name, found in self.text_loss.items() if domain in (None, name)]
        count = sum(tokens for _, tokens in losses)
        return math.exp(sum(loss for loss, _ in losses) / count) if count else None

    @property
    def longest_document(self) -> int:
        """Return the number of tokens of the longest document."""
        positions = document_positions((len(self.valid), self.valid.shape[1]), self.valid, self.document_ids)
        return int(positions.max()) + 1 if positions.numel() else 0

    def trace(self, rows: Tensor | slice = slice(None), device: torch.device | str = "cpu") -> RoutingTrace:
        """Return some rows as a trace, for the metrics."""
        return RoutingTrace(
            [ids[rows].to(device).long() for ids in self.expert_ids],
            tuple(self.num_experts),
            valid=self.valid[rows].to(device),
            document_ids=None if self.document_ids is None else self.document_ids[rows].to(device),
            layer_names=tuple(self.layer_names),
        )

    def chunks(
        self, rows: Tensor | None = None, device: torch.device | str = "cpu"
    ) -> Iterator[tuple[RoutingTrace, Tensor]]:
        """Yield rows some at a time, all unless numbers are given: their routing and their numbers [B]."""
        rows = torch.arange(len(self.valid)) if rows is None else rows
        for part in rows.split(CHUNK_ROWS):
            yield self.trace(part, device), part.to(device)

    def stacks(self) -> Iterator["Recording"]:
        """Return the encoder and the decoder of an encoder-decoder as models of their own; any other model as it is."""
        of_stack = {stack: [i for i, name in enumerate(self.layer_names) if _is_of(stack, name)] for stack in STACKS}
        if not all(of_stack.values()) or sum(map(len, of_stack.values())) != len(self.layer_names):
            yield self
            return
        for stack, layers in of_stack.items():
            yield replace(
                self,
                model=f"{self.model} ({stack})",
                expert_ids=[self.expert_ids[i] for i in layers],
                num_experts=[self.num_experts[i] for i in layers],
                layer_names=[self.layer_names[i] for i in layers],
                expert_bytes=None if self.expert_bytes is None else [self.expert_bytes[i] for i in layers],
                token_ids=self.token_ids if stack == "encoder" else self.decoder_token_ids,
                decoder_token_ids=None,
            )


def compact(num_experts: int) -> torch.dtype:
    """Return the smallest integer dtype for the ids of so many experts.

    Example:
        >>> compact(256), compact(257)
        (torch.uint8, torch.int16)
    """
    return torch.uint8 if num_experts <= 256 else torch.int16 if num_experts <= 2**15 else torch.int32


def save_trace(recording: Recording, path: Path) -> None:
    """Write a recording, as a whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    tensors = {f"expert_ids.{i}": ids.contiguous() for i, ids in enumerate(recording.expert_ids)}
    tensors |= {"valid": recording.valid.to(torch.uint8), "domain_ids": recording.domain_ids}
    tensors |= {name: ids for name in OF_TOKENS if (ids := getattr(recording, name)) is not None}
    routing = {name: getattr(recording, name) for name in IN_METADATA}
    metadata = {"format": FORMAT, "format_version": VERSION, "routing": json.dumps(routing)}
    write_atomically(path, save(tensors, metadata))


def load_trace(path: Path) -> Recording:
    """Read what :func:`save_trace` or another program wrote, and check all of it.

    Also the files of :mod:`~consistency_reg.lab.evaluate.foreign_traces`, by their names.

    Raises:
        ValueError: the file is truncated, of another kind or of a later version, or its content does not fit together.
        OSError: there is no such file, or it cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no trace file {path}")
    routing, tensors = read_foreign(path) if is_foreign(path) else _read_saved(path)
    try:
        recording = _recording(routing, tensors)
        for trace, _ in recording.chunks():
            trace.check_values()
    except (KeyError, TypeError, ValueError) as error:
        said = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} holds no routing that fits together: {said}") from error
    return recording


def _read_saved(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the metadata and tensors that :func:`save_trace` wrote."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no dict
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole trace file (safetensors: {error})") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is no saved routing: its metadata must have format={FORMAT!r}, got {metadata}")
    if metadata.get("format_version") != VERSION:
        found = metadata.get("format_version")
        raise ValueError(f"{path} must have format_version {VERSION!r}, got {found!r}: another version wrote it")
    try:
        return json.loads(metadata["routing"]), tensors
    except (KeyError, ValueError) as error:
        said = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} holds no routing that fits together: {said}") from error


def _recording(routing: dict[str, Any], tensors: dict[str, Tensor]) -> Recording:
    known = {name: routing[name] for name in IN_METADATA if name in routing}
    layers = len(known["layer_names"])
    ids = [tensors[f"expert_ids.{i}"] for i in range(layers)]
    valid, domain_ids = tensors["valid"].bool(), tensors["domain_ids"]
    of_tokens: dict[str, Any] = {name: tensors[name] for name in OF_TOKENS if name in tensors}
    if valid.dim() != 2:
        raise ValueError(f"valid must have shape [N, T], got {list(valid.shape)}")
    for name, tensor in {f"expert_ids.{i}": layer for i, layer in enumerate(ids)}.items() | of_tokens.items():
        shape = [*valid.shape, "K"] if name.startswith("expert_ids") else list(valid.shape)
        if tensor.dim() != len(shape) or tensor.shape[:2] != valid.shape:
            raise ValueError(f"{name} must have shape {shape}, got {list(tensor.shape)}")
        if tensor.is_floating_point() or tensor.dtype == torch.bool:
            raise TypeError(f"{name} must be integers, got {tensor.dtype}")
    for name in ("model", "domains", "layer_names"):
        texts = [known[name]] if name == "model" else known[name]
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise TypeError(
                f"{name} must be {'a string' if name == 'model' else 'a list of strings'}, got {known[name]!r}"
            )
    for name in ("num_experts", "expert_bytes"):
        if known.get(name) is not None and len(known[name]) != layers:
            raise ValueError(f"{name} must have one entry for each of the {layers} layers, got {len(known[name])}")
    of_expert = known.get("expert_bytes") or [1]
    if not all(isinstance(size, int) and 1 <= size <= MOST_BYTES for size in of_expert):
        raise ValueError(f"expert_bytes must be whole numbers from 1 to {MOST_BYTES}, got {of_expert}")
    for domain, found in known.get("text_loss", {}).items():
        if domain not in known["domains"] or len(found) != 2 or not math.isfinite(found[0]) or found[1] < 1:
            raise ValueError(f"text_loss must hold (loss, tokens) of each domain, got {found} for {domain!r}")
    if domain_ids.shape != valid.shape[:1] or domain_ids.is_floating_point():
        raise ValueError(f"domain_ids must be integers [N] = {[len(valid)]}, got {list(domain_ids.shape)}")
    if domain_ids.numel() and not 0 <= int(domain_ids.min()) <= int(domain_ids.max()) < len(known["domains"]):
        raise ValueError(f"domain_ids must lie in 0..{len(known['domains']) - 1}, the domains, got others")
    if not 0 <= known.get("sample_row", 0) < max(len(valid), 1):
        raise ValueError(f"sample_row must lie in 0..{len(valid) - 1}, got {known['sample_row']}")
    if not bool(valid.any()):
        raise ValueError("valid must mark at least one real token, got none")
    of_tokens = {name: tensor.long() for name, tensor in of_tokens.items()}
    return Recording(**known, expert_ids=ids, valid=valid, domain_ids=domain_ids.long(), **of_tokens)


def _is_of(stack: str, layer_name: str) -> bool:
    return stack in layer_name.split(".")
