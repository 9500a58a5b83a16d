"""Find where the tensors of a safetensors checkpoint lie in its files.

Source of the format: https://github.com/huggingface/safetensors#format (8 bytes with the length of a JSON header, the
header, the tensors' bytes).
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """Locates a tensor, or a contiguous part of one, in a file.

    Attributes:
        path: of the file.
        offset: of its first byte.
        dtype: of its elements.
        shape: of it.
    """

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The number of its bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def row(self, index: int) -> "StoredTensor":
        """Return one entry of its first dimension."""
        row = StoredTensor(self.path, self.offset, self.dtype, self.shape[1:])
        return StoredTensor(self.path, self.offset + index * row.nbytes, self.dtype, row.shape)


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return every tensor of a model's folder, from one file or from several with an index.

    Where both are there the one file counts, as for transformers: saving a model in one file leaves a former index.

    Raises:
        FileNotFoundError: the folder holds no safetensors checkpoint, or lacks a file of it.
        ValueError: a file is truncated or is no safetensors file.
    """
    if (folder / SINGLE).is_file():
        names = [SINGLE]
    elif (folder / INDEX).is_file():
        names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    else:
        raise FileNotFoundError(f"{folder} must hold {SINGLE} or {INDEX}, and has neither")
    tensors: dict[str, StoredTensor] = {}
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / INDEX} names {name}, which is not there")
        tensors |= read_header(folder / name)
    return tensors


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of one safetensors file by name, without reading them.

    Raises:
        ValueError: the file is truncated or is no safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{path} is truncated or no safetensors file: its header would end behind its end")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise ValueError(f"{path} is no safetensors file: its header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path} is no safetensors file: its header is a {type(header).__name__}")
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        if 8 + length + end > size:
            raise ValueError(f"{path} is truncated: {name} ends at byte {8 + length + end} of a file of {size}")
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{path}: {name} is of the unknown dtype {entry['dtype']}")
        found = StoredTensor(path, 8 + length + begin, DTYPES[entry["dtype"]], tuple(entry["shape"]))
        if begin < 0 or end - begin != found.nbytes:
            raise ValueError(f"{path} is damaged: {name} of {found.nbytes} bytes would lie in bytes {begin} to {end}")
        tensors[name] = found
    return tensors


def as_bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the CPU, writable."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
