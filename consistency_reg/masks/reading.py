"""Read which tokens of a batch are real and where its documents begin.

What is read, from where and in which order, stands in docs/tokens.md.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from consistency_reg.devices import is_on_host
from consistency_reg.masks.attention import read_attention
from consistency_reg.masks.batches import (
    BOUNDARIES,
    CUMULATIVE,
    DESCRIBES_TOKENS,
    KEYS,
    Masks,
    Shape,
    given_by,
    misshapen,
    token_ids,
    token_shape,
)

IGNORED_LABEL = -100


def batch_masks(batch: Any) -> Masks:
    """Return (valid, document_ids) of a batch, both [B, T] or None.

    A mapping with the usual keys is read: ``attention_mask`` says which tokens are real; ``document_ids``, ``seq_idx``,
    ``cu_seq_lens_q`` or else ``position_ids`` (a new document wherever they do not go on by one) say where documents
    begin. docs/tokens.md lists every form.

    Raises:
        ValueError: one of them has a shape that does not describe the tokens of the batch.

    Example:
        >>> valid, document_ids = batch_masks({"position_ids": torch.tensor([[0, 1, 2, 0, 1]])})
        >>> valid, document_ids
        (None, tensor([[0, 0, 0, 1, 1]]))
    """
    return read_masks(given_by(batch))


def read_masks(given: Mapping[str, Any], shape: Shape | None = None, pad_id: int | None = None) -> Masks:
    """Return (valid, document_ids) of [B, T] tokens, each None where nothing tells.

    Args:
        given: what describes the tokens, by the names of :data:`KEYS`; others have no effect.
        shape: (B, T) of the tokens; that of ``input_ids`` when None.
        pad_id: the id that pads have, where it is known.

    Raises:
        ValueError: something in ``given`` does not describe [B, T] tokens.
    """
    if not any(given.get(name) is not None for name in DESCRIBES_TOKENS):
        return None, None
    shape = shape or token_shape(given)
    cached = given.get("past_key_values") is not None
    mask = given.get("attention_mask")
    valid, attended = read_attention(mask, shape, cached=cached)
    explicit = next((name for name in BOUNDARIES[:-1] if given.get(name) is not None), None)
    if explicit is not None:
        document_ids, inside = _read_documents(explicit, given[explicit], shape)
        valid = _both(valid, inside)
    else:
        begins = [attended, _read_positions(given.get("position_ids"), shape)]
        found = [one for one in begins if one is not None]
        document_ids = torch.stack(found).any(dim=0).long().cumsum(dim=1) if found else None
        if document_ids is None:
            document_ids = _numbered_in(mask)
    square = attended is not None and explicit is None and pad_id is not None  # pads may attend themselves there
    if document_ids is not None and (mask is None or square):
        valid = _both(valid, _without_lonely_pads(given, document_ids, pad_id, on_the_left=square))
    return valid, document_ids


def labelled_tokens(given: Mapping[str, Any], shape: Shape) -> Tensor:
    """Return which [B, T] tokens have a label, those that a model learns to write.

    Raises:
        ValueError: there are no labels, or they are not those of [B, T] tokens.
    """
    labels, shifted = given.get("labels"), given.get("shift_labels")
    if labels is None and shifted is not None:  # the label of a token stands where the token before it is
        labels = torch.nn.functional.pad(shifted, (1, 0), value=IGNORED_LABEL)[:, :-1]
    if not isinstance(labels, Tensor) or labels.shape != shape:
        got = "none" if labels is None else f"{list(labels.shape)}" if isinstance(labels, Tensor) else type(labels)
        raise ValueError(f"tokens='labels' needs labels of the tokens [B, T] = {list(shape)}, got {got}")
    return labels != IGNORED_LABEL


def count_tokens(batch: Any, masks: Callable[[Any], Masks] | None = None) -> Tensor | int:
    """Return the real tokens of a batch or of a batch of batches; 0 where they cannot be told.

    The count stays on the batch's device, so that no host waits.

    Args:
        batch: whatever a loader gives.
        masks: ``batch -> (valid, document_ids)``, in place of what is read.

    Example:
        >>> count_tokens({"code": torch.zeros(2, 3, dtype=torch.int64), "text": [torch.zeros(1, 4, dtype=torch.int64)]})
        10
    """
    valid = (batch_masks if masks is None else masks)(batch)[0]
    if valid is not None:
        return valid.sum()
    ids = token_ids(batch)
    if ids is not None:
        return ids.numel()
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    counts = [count_tokens(part) for part in parts if not isinstance(part, Tensor) or isinstance(batch, Mapping)]
    if isinstance(batch, Mapping) and any(name in batch for name in KEYS):
        return 0  # a batch without ids, not one of batches
    return sum(counts[1:], counts[0]) if counts else 0


def _both(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """Return which tokens are real by two accounts, of which None knows nothing."""
    if one is None or other is None:
        return other if one is None else one
    return one & other


def _read_documents(name: str, value: Any, shape: Shape) -> Masks:
    """Return explicit document ids, and which tokens belong to one where that is told too."""
    if not isinstance(value, Tensor):
        raise misshapen(name, value, shape)
    B, T = shape
    if name in CUMULATIVE:
        ends = value.flatten()[1:]
        token = torch.arange(B * T, device=value.device)
        document_ids = torch.bucketize(token, ends.to(token.dtype), right=True)
        return document_ids.view(B, T), (token < ends[-1]).view(B, T)
    if value.shape not in ((B, T), (1, T)):
        raise misshapen(name, value, shape)
    document_ids = value if len(value) == B else value.expand(B, T)
    return document_ids, document_ids >= 0 if name == "seq_idx" else None


def _read_positions(positions: Any, shape: Shape) -> Tensor | None:
    """Return where documents begin by [B, T] positions, or by those of text and pictures, [3 or 4, B, T]."""
    if positions is None:
        return None
    if not isinstance(positions, Tensor):
        raise misshapen("position_ids", positions, shape)
    B, T = shape
    of_text = positions
    if positions.dim() == 3 and positions.shape[-2:] in ((B, T), (1, T)):
        if len(positions) in (1, 4):
            of_text = positions[0]  # the first of four is that of the text
        else:
            return _first_of_pictures(positions).expand(B, T)
    if of_text.dim() == 1:
        of_text = of_text[None]
    if of_text.shape not in ((B, T), (1, T)):
        raise misshapen("position_ids", positions, shape)
    begins = torch.zeros_like(of_text, dtype=torch.bool)
    begins[:, 1:] = of_text[:, 1:] != of_text[:, :-1] + 1
    return begins.expand(B, T)


def _first_of_pictures(positions: Tensor) -> Tensor:
    """Return where [3, B, T] positions (time, height, width) begin anew: all 0, or the time goes back."""
    begins = (positions == 0).all(dim=0)
    begins[:, 1:] |= positions[0, :, 1:] < positions[0, :, :-1]
    return begins


def _numbered_in(mask: Any) -> Tensor | None:
    """Return the documents that a [B, T] mask of integers numbers, 1, 2, ...; None where it can hold 0 and 1 alone."""
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.is_floating_point() or mask.dtype == torch.bool:
        return None
    return None if is_on_host(mask) and not bool((mask > 1).any()) else mask.long()  # a GPU's host does not wait


def _without_lonely_pads(
    given: Mapping[str, Any], document_ids: Tensor, pad_id: int | None, *, on_the_left: bool
) -> Tensor | None:
    """Return which tokens are no pads, where pads end (or begin) a row as documents of one token.

    They have the pad's id, or if that is not known the same one, twice at least; and no label.
    """
    ids, labels = given.get("input_ids"), given.get("labels")
    if not isinstance(ids, Tensor) or ids.shape != document_ids.shape or ids.shape[1] < 2:
        return None
    alone = torch.ones_like(document_ids, dtype=torch.bool)
    alone[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    alone[:, :-1] &= alone[:, 1:].clone()
    alone &= ids == (ids[:, -1:] if pad_id is None else pad_id)
    if isinstance(labels, Tensor) and labels.shape == ids.shape:
        alone &= labels == IGNORED_LABEL
    pads = _run_at_end(alone, least=2 if pad_id is None else 1)
    if on_the_left:
        pads = pads | _run_at_end(alone.flip(1), least=1).flip(1)
    return ~pads


def _run_at_end(marked: Tensor, least: int) -> Tensor:
    """Return which of [B, T] are in the run of marked ones that ends a row, if it has at least so many."""
    run = marked.flip(1).long().cumprod(dim=1).flip(1).bool()
    return run & run[:, -least:].all(dim=1, keepdim=True)
