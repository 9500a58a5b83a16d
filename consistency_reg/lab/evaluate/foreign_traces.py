"""Routing that other programs recorded: route traces of engines, and arrays of expert ids.

- ``*.csv`` or ``*.csv.gz`` that begins with ``# route_trace v1``: comment lines with ``key=value`` pairs (``model``,
  ``n_expert``, and for each ``layer`` its ``expert_bytes``), then the columns turn, phase (0 prompt, 1 decoding), step,
  layer, slot (the rank of the choice), expert, and, where known, residency (1 where the cache held the expert).
- ``*.npz`` with ``experts`` [L, T, K] integers, one stream of tokens, and ``meta``, JSON text with ``num_experts`` and
  ``model``.
"""

import csv
import gzip
import json
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

MAGIC = "# route_trace v1"
COLUMNS = ("turn", "phase", "step", "layer", "slot", "expert")
NUMBERS = ("n_expert", "layer", "expert_bytes", "dense_bytes")  # of comments
PROMPT = 0  # the phase in which all tokens of a turn are one call of each layer
SUFFIXES = (".csv", ".csv.gz", ".npz")


@dataclass(frozen=True)
class RouteTrace:
    """Holds a trace that an engine wrote: what it routed and what its cache held.

    Attributes:
        model: the model's file.
        expert_ids: [T, K] int64 for each layer; 0..K-1 where it did not compute a token.
        routed: [T] bool for each layer, the tokens that it computed: of a prompt the last layer may need one alone.
        num_experts: E of each layer.
        layer_names: of each layer.
        document_ids: [T] int64, the turn.
        calls: [T] int64, tokens that the engine computed in one call.
        dense_bytes: of the weights of all layers that are no experts'; None where the file does not say.
        expert_bytes: bytes of an expert of each layer; None where the file does not say.
        residency: [T, K] bool for each layer, whether the cache held the expert; None where the file does not say.
    """

    model: str
    expert_ids: list[Tensor]
    routed: list[Tensor]
    num_experts: list[int]
    layer_names: list[str]
    document_ids: Tensor
    calls: Tensor
    expert_bytes: list[int] | None
    residency: list[Tensor] | None
    dense_bytes: int | None = None

    def parts(self, domain: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the metadata and tensors of a saved routing, see :mod:`~consistency_reg.lab.evaluate.traces`.

        Layers that did not compute every token are left out.
        """
        whole = [i for i, tokens in enumerate(self.routed) if bool(tokens.all())]
        left_out = [name for i, name in enumerate(self.layer_names) if i not in whole]
        about: dict[str, Any] = {}
        if left_out:
            about["layers left out, as they did not compute every token"] = left_out
        if self.dense_bytes is not None:
            about["dense_bytes"] = self.dense_bytes
        metadata: dict[str, Any] = {
            "model": self.model,
            "num_experts": [self.num_experts[i] for i in whole],
            "layer_names": [self.layer_names[i] for i in whole],
            "domains": [domain],
            "expert_bytes": None if self.expert_bytes is None else [self.expert_bytes[i] for i in whole],
            "about": about,
        }
        tensors = {f"expert_ids.{place}": self.expert_ids[i][None] for place, i in enumerate(whole)}
        tensors |= {
            "valid": torch.ones(1, len(self.document_ids), dtype=torch.bool),
            "domain_ids": torch.zeros(1, dtype=torch.int64),
            "document_ids": self.document_ids[None],
        }
        return metadata, tensors


def is_foreign(path: Path) -> bool:
    """Return whether a file's name says that another program wrote it.

    Example:
        >>> is_foreign(Path("qwen.route.csv.gz")), is_foreign(Path("olmoe.safetensors"))
        (True, False)
    """
    return path.name.lower().endswith(SUFFIXES)


def read_foreign(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the metadata and tensors of a saved routing from what another program wrote.

    Raises:
        ValueError: the file is truncated or of another kind.
        OSError: it cannot be read.
    """
    if path.name.lower().endswith(".npz"):
        return _read_npz(path)
    return read_route_csv(path).parts(path.name.split(".")[0])


def read_route_csv(path: Path) -> RouteTrace:
    """Read a route trace.

    Raises:
        ValueError: the file is truncated or of another kind, a line is not numbers, or a layer misses a token.
        OSError: it cannot be read.
    """
    opened = gzip.open if path.name.lower().endswith(".gz") else open
    try:
        with opened(path, "rt", encoding="utf-8", newline="") as file:
            lines = file.read().splitlines()
    except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no whole route trace: {error}") from error
    if not lines or lines[0].strip() != MAGIC:
        raise ValueError(f"{path} is no route trace: its first line must be {MAGIC!r}, got {lines[:1]}")
    comments = [line for line in lines if line.startswith("#")]
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    missing = [column for column in COLUMNS if not rows or column not in rows[0]]
    if missing:
        raise ValueError(f"{path} must have rows with the columns {list(COLUMNS)}, but lacks {missing}")
    return _RouteRows(path, comments, rows).trace()


class _RouteRows:
    """Puts the rows of a route trace in the order of tokens, layers and slots."""

    def __init__(self, path: Path, comments: list[str], rows: list[dict[str, str]]) -> None:
        self.path = path
        self.values = {name: self._integers(rows, name) for name in COLUMNS}
        if negative := [name for name, values in self.values.items() if values.min() < 0]:
            raise ValueError(f"{path} must have numbers of 0 or more as {negative[0]!r}, got others")
        self.residency = self._integers(rows, "residency") if "residency" in rows[0] else None
        self.model, self.num_experts = "unknown", 0
        self.bytes: dict[int, int] = {}
        self.dense_bytes: int | None = None
        for comment in comments:
            said = dict(re.findall(r"(\w+)=(\S+)", comment))
            self.model = Path(said.get("model", self.model)).name
            numbers = {name: _whole_number(path, name, said[name]) for name in NUMBERS if name in said}
            self.num_experts = numbers.get("n_expert", self.num_experts)
            if "layer" in numbers and "expert_bytes" in numbers:
                self.bytes[numbers["layer"]] = numbers["expert_bytes"]
            if "layer" in numbers and "dense_bytes" in numbers:
                self.dense_bytes = (self.dense_bytes or 0) + numbers["dense_bytes"]

    def _integers(self, rows: list[dict[str, str]], name: str) -> np.ndarray:
        try:
            return np.array([int(row[name]) for row in rows], dtype=np.int64)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{self.path} must have whole numbers as {name!r}: {error}") from error

    def trace(self) -> RouteTrace:
        """Return the trace; raise ValueError where a layer does not have as many experts for each token."""
        tokens = np.stack([self.values[name] for name in ("turn", "phase", "step")])
        (turn_T, phase_T, _), token_of_row = np.unique(tokens, axis=1, return_inverse=True)
        numbers = np.unique(self.values["layer"]).tolist()
        layers = [self._layer(number, token_of_row.reshape(-1), phase_T) for number in numbers]
        experts = self.num_experts or 1 + int(self.values["expert"].max())
        is_new_call = np.ones(len(turn_T), dtype=bool)
        is_new_call[1:] = (phase_T[1:] != PROMPT) | (phase_T[:-1] != PROMPT) | (turn_T[1:] != turn_T[:-1])
        return RouteTrace(
            model=self.model,
            expert_ids=[ids for ids, _, _ in layers],
            routed=[routed for _, routed, _ in layers],
            num_experts=[experts] * len(numbers),
            layer_names=[f"layer_{number:02d}" for number in numbers],
            document_ids=torch.from_numpy(turn_T),
            calls=torch.from_numpy(is_new_call.cumsum() - 1),
            expert_bytes=[self.bytes[number] for number in numbers] if set(numbers) <= set(self.bytes) else None,
            residency=None if self.residency is None else [held for _, _, held in layers],
            dense_bytes=self.dense_bytes,
        )

    def _layer(self, number: int, token_of_row: np.ndarray, phase: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Return the ids, the tokens that were computed, and what the cache held of a layer."""
        of_layer = self.values["layer"] == number
        token, slot = token_of_row[of_layer], self.values["slot"][of_layer]
        T, K = len(phase), 1 + int(slot.max())
        ids, held = np.tile(np.arange(K), (T, 1)), np.zeros((T, K), dtype=bool)
        rows = np.bincount(token * K + slot, minlength=T * K).reshape(T, K)
        routed = np.asarray(rows.any(axis=1))
        is_decoded = np.not_equal(phase, PROMPT)
        if (rows[routed] != 1).any() or not routed[is_decoded].all():
            raise ValueError(
                f"{self.path} must have the slots 0..{K - 1} of layer {number} once for each token that it computes, "
                f"of the tokens after a prompt all"
            )
        ids[token, slot] = self.values["expert"][of_layer]
        if self.residency is not None:
            held[token, slot] = self.residency[of_layer] > 0
        return torch.from_numpy(ids), torch.from_numpy(routed), torch.from_numpy(held)


def _read_npz(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("experts", "meta") if name in file.files}
    except (ValueError, EOFError, BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is no whole file of arrays (npz): {error}") from error
    if "experts" not in arrays:
        raise ValueError(f"{path} must hold the array 'experts' [L, T, K], but lacks it")
    experts_LTK = arrays["experts"]
    if experts_LTK.ndim != 3 or experts_LTK.dtype.kind not in "iu" or not experts_LTK.size:
        raise ValueError(
            f"{path} must hold integers 'experts' [L, T, K], got {experts_LTK.dtype} {list(experts_LTK.shape)}"
        )
    meta = _meta(path, arrays.get("meta"))
    L, T, _ = experts_LTK.shape
    trace = RouteTrace(
        model=str(meta.get("model", path.stem)),
        expert_ids=list(torch.from_numpy(experts_LTK.astype(np.int64)).unbind(0)),
        routed=[torch.ones(T, dtype=torch.bool)] * L,
        num_experts=[_whole_number(path, "num_experts", meta.get("num_experts", 1 + int(experts_LTK.max())))] * L,
        layer_names=[f"layer_{number:02d}" for number in range(L)],
        document_ids=torch.zeros(T, dtype=torch.int64),
        calls=torch.arange(T),
        expert_bytes=None,
        residency=None,
    )
    return trace.parts(path.stem)


def _whole_number(path: Path, name: str, value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise ValueError(f"{path} must have a whole number as {name!r}, got {value!r}") from None


def _meta(path: Path, text: np.ndarray | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        meta = json.loads(str(text))
    except ValueError as error:
        raise ValueError(f"{path} must hold JSON as 'meta': {error}") from error
    if not isinstance(meta, dict):
        raise ValueError(f"{path} must hold a JSON object as 'meta', got {text}")
    return meta
