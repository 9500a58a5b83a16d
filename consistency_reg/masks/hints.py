"""Find what in a batch or a dataset hints at padding or at boundaries of documents although it is not read.

Names that others use for such things come in forms that cannot be told apart, so they are reported, not guessed.
"""

import re
from collections.abc import Mapping
from numbers import Number
from typing import Any

from torch import Tensor

from consistency_reg.masks.batches import BOUNDARIES, CUMULATIVE, DESCRIBES_TOKENS, KEYS

OF_BOUNDARIES = re.compile(
    r"segment|boundar|pack|block_mask|cu_?seq|^inputs?_pos(ition)?s?$"
    r"|(^|_)(doc|document|sample|example|seq|sequence)s?_?(id|idx|index|indice|number|mask|position)(e?s)?$"
    r"|(^|_)(doc|document|sample|example)s?_?(len|length|start|end|offset)s?$"
)
# In a row of a dataset; in a batch such a name may hold the lengths of its rows.
OF_LENGTHS = re.compile(r"(^|_)seq(uence)?_?(len|length)s$")
OF_PADS = re.compile(r"mask|(^|_)pad(s|ded|ding)?(_|$)|(^|_|seq)(len|length)s?$")
OF_OTHERS = re.compile(  # things with such names that say nothing about the tokens that are routed
    r"decoder|encoder|memory|cross|label|loss|completion|assistant|special|prompt|target|output|answer|question"
    r"|pixel|image|img|patch|tile|video|vision|visual|audio|acoustic|speech|feature|box|token_type|head|cache|past"
    r"|embed|bias|masked|side|max_|min_|num_|mlm"
)


def unread_hints(
    told: Mapping[str, Any], batch: Mapping[str, Any], inner: Mapping[str, Any], *, encoder_decoder: bool = False
) -> tuple[list[str], list[str]]:
    """Return the names that hint at boundaries of documents, and those at padding, where nothing that is read tells.

    Args:
        told: what describes the tokens, as it is read.
        batch: what the step was given, by name.
        inner: what the batches within that batch hold, by name.
        encoder_decoder: whether the tokens may be those of a decoder: then the masks of the batch may be its encoder's.

    Example:
        >>> import torch
        >>> ids, mask, one = torch.ones(1, 4), torch.ones(1, 4), torch.ones(1, 4)
        >>> unread_hints({"input_ids": ids}, {"input_ids": ids, "segment_ids": one}, {"pad_mask": one})
        (['segment_ids'], ['pad_mask'])
        >>> unread_hints({"input_ids": ids, "attention_mask": mask}, {"segment_ids": one, "lengths": one}, {})
        (['segment_ids'], [])
    """
    found = {**inner, **batch, **told}
    dropped = () if encoder_decoder else [name for name in DESCRIBES_TOKENS if name in found and name not in told]
    boundaries = [name for name in found if is_hint(name, found[name]) and OF_BOUNDARIES.search(name.lower())]
    pads = [name for name in found if is_hint(name, found[name]) and name not in boundaries]
    boundaries += [name for name in dropped if name in BOUNDARIES]
    pads += [name for name in dropped if name not in BOUNDARIES]
    return (
        [] if _tells_boundaries(told) else sorted(boundaries),
        [] if _tells_pads(told) else sorted(pads),
    )


def is_hint(name: str, value: Any) -> bool:
    """Return whether something of this name may tell of padding or boundaries, and is not read.

    Example:
        >>> [is_hint(name, [1, 2]) for name in ("doc_ids", "lengths", "attention_mask", "completion_mask")]
        [True, True, False, False]
    """
    if (
        name in KEYS
        or value is None
        or isinstance(value, str | Number)
        or (isinstance(value, Tensor) and not value.dim())
    ):
        return False
    name = name.lower()
    return not OF_OTHERS.search(name) and bool(OF_BOUNDARIES.search(name) or OF_PADS.search(name))


def told_boundaries(dataset: Any) -> tuple[str, ...]:
    """Return the columns of a dataset that tell, or may tell, where documents begin.

    Example:
        >>> told_boundaries([{"input_ids": [1, 2], "document_ids": [0, 1], "doc_id": "a name", "seq_lengths": [1, 1]}])
        ('document_ids', 'seq_lengths')
    """
    names = getattr(dataset, "column_names", None)
    row: Mapping[str, Any] = {}
    if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and len(dataset):
        first = dataset[0]
        row = first if isinstance(first, Mapping) else {}
    known = tuple(name for name in BOUNDARIES if name in (names or row))
    names_of_row = (name for name in row if isinstance(name, str))
    hints = (name for name in names_of_row if OF_BOUNDARIES.search(name.lower()) or OF_LENGTHS.search(name.lower()))
    return known + tuple(name for name in hints if name not in known and _is_row(name, row[name]))


def _is_row(name: str, value: Any) -> bool:
    """Return whether a column holds numbers for tokens or documents, not one thing for a row."""
    values = value.tolist() if hasattr(value, "tolist") else value
    return is_hint(name, value) and isinstance(values, list | tuple) and all(isinstance(one, int) for one in values)


def inner_batches(batch: Any, depth: int = 0) -> dict[str, Any]:
    """Return what the batches within a batch hold, by name.

    Example:
        >>> list(inner_batches({"code": {"attention_mask": [1, 1]}, "text": [{"doc_ids": [1]}]}))
        ['attention_mask', 'doc_ids']
    """
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    found: dict[str, Any] = {}
    for part in parts:
        if isinstance(part, Mapping):
            found |= {name: value for name, value in part.items() if isinstance(name, str) and value is not None}
        if isinstance(part, Mapping | list | tuple) and depth < 3:
            found |= inner_batches(part, depth + 1)
    return found


def looks_padded(given: Mapping[str, Any], pad_id: int | None) -> bool:
    """Return whether a row of ``input_ids`` begins or ends with two or more pads; reads the data."""
    ids = given.get("input_ids")
    if pad_id is None or not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] < 2:
        return False
    pads = ids == pad_id
    whole_row = pads.all(dim=1)
    return bool(((pads[:, -2:].all(dim=1) | pads[:, :2].all(dim=1)) & ~whole_row).any())


def _tells_boundaries(told: Mapping[str, Any]) -> bool:
    mask = told.get("attention_mask")
    plain = mask is None or (isinstance(mask, Tensor) and (mask.dim() == 2 or mask.shape[-2] == 1))
    return not plain or any(told.get(name) is not None for name in BOUNDARIES)


def _tells_pads(told: Mapping[str, Any]) -> bool:
    return any(told.get(name) is not None for name in ("attention_mask", "seq_idx", *CUMULATIVE))
