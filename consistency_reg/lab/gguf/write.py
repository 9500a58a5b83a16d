"""Write a model and its tokenizer as one GGUF file, whole or not at all.

Source of the format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from consistency_reg.lab.files import Draft
from consistency_reg.lab.gguf.settings import ARCHITECTURE, check_exportable, settings
from consistency_reg.lab.gguf.tensors import tensors
from consistency_reg.lab.gguf.vocabulary import Vocabulary, vocabulary
from consistency_reg.optional import require

with require("gguf"):
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
    from gguf.gguf_writer import WriterState

TYPES = {
    "float32": (torch.float32, GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "float16": (torch.float16, GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bfloat16": (torch.bfloat16, GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
}
ALIGNMENT = 32  # bytes


def write_gguf(model: Any, tokenizer: Any, path: Path, *, name: str = "", dtype: str = "auto") -> None:
    """Write a GGUF file that llama.cpp computes the same logits from as transformers from the model.

    Args:
        model: a GraniteMoe or GraniteMoeShared in memory.
        tokenizer: its byte-level BPE.
        path: of the file; the folder is made if it is not there.
        name: of the model, shown by engines.
        dtype: of matrices: "float32", "float16", "bfloat16", or "auto" for the model's own. Norms and routers are
            always float32, as llama.cpp wants them.

    Raises:
        ValueError: an architecture, a tokenizer or a dtype that cannot be written.
        OSError: no space, or no right to write; names the folder. The former file is untouched.
    """
    check_exportable(model.config)
    words = vocabulary(tokenizer, model.config.vocab_size)
    wanted = _dtype(model, dtype)
    writer = GGUFWriter(None, ARCHITECTURE)
    writer.add_name(name or model.config.model_type)
    writer.add_file_type(TYPES[wanted][-1])
    _add_settings(writer, settings(model.config))
    _add_vocabulary(writer, words)
    held = [(key, weights.detach(), *_kind(key, weights, wanted)) for key, weights in tensors(model)]
    for key, weights, kept_as, kind in held:
        size = weights.numel() * kept_as.itemsize
        writer.add_tensor_info(key, weights.shape, np.dtype(np.float32), size, raw_dtype=kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = Draft(path)
    with draft.writing() as file:
        file.write(_padded(_header(writer)))
        for _, weights, kept_as, _ in held:
            file.write(_padded(_bytes(weights.to(kept_as))))
    draft.commit()


def _dtype(model: Any, dtype: str) -> str:
    wanted = str(model.dtype).removeprefix("torch.") if dtype == "auto" else dtype
    if wanted not in TYPES:
        raise ValueError(f"dtype must be one of auto, {', '.join(TYPES)}, got {wanted!r}")
    return wanted


def _kind(name: str, weights: Tensor, wanted: str) -> tuple[torch.dtype, GGMLQuantizationType]:
    """Return how a tensor is kept: norms and routers in full."""
    dtype, kind, _ = TYPES["float32" if weights.dim() < 2 or ".ffn_gate_inp." in name else wanted]
    return dtype, kind


def _add_settings(writer: GGUFWriter, found: Mapping[str, int | float]) -> None:
    for key, value in found.items():
        if isinstance(value, float):
            writer.add_float32(f"{ARCHITECTURE}.{key}", value)
        else:
            writer.add_uint32(f"{ARCHITECTURE}.{key}", value)


def _add_vocabulary(writer: GGUFWriter, words: Vocabulary) -> None:
    writer.add_tokenizer_model("gpt2")  # llama.cpp's name of byte-level BPE
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    writer.add_token_merges(words.merges)
    for name, number in words.special.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", number)
    writer.add_add_bos_token(words.add_bos)
    if words.chat_template is not None:
        writer.add_chat_template(words.chat_template)


def _header(writer: GGUFWriter) -> bytes:
    """Return everything before the weights, so that they can be written one after the other by ourselves."""
    header: Any = io.BytesIO()
    writer.fout, writer.state = [header], WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return header.getvalue()


def _bytes(weights: Tensor) -> bytes:
    return weights.contiguous().view(torch.uint8).numpy().tobytes()


def _padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % ALIGNMENT)
