"""Read which tokens of a batch are real and where its documents begin, in every form that trainers give them.

The one reader of batches: what it reads, from where and in which order stands in docs/tokens.md.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Masks = tuple[Tensor | None, Tensor | None]
Shape = tuple[int, int]

# What is read of a batch, or of the arguments that a model is called with.
TOKENS = ("input_ids", "inputs_embeds")
CUMULATIVE = ("cu_seq_lens_q", "cu_seqlens_q", "cu_seqlens", "cu_seq_lens", "cu_seq_lens_k", "cu_seqlens_k")
BOUNDARIES = ("document_ids", "seq_idx", *CUMULATIVE, "position_ids")
DESCRIBES_TOKENS = ("attention_mask", *BOUNDARIES)
LABELS = ("labels", "shift_labels")
KEYS = (*TOKENS, *DESCRIBES_TOKENS, *LABELS, "past_key_values")

NOT_ATTENDED = -1000.0  # and less, in a mask that is added to scores
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


def given_by(batch: Any) -> dict[str, Any]:
    """Return what a batch holds by name: a mapping, a named tuple, or an object with attributes."""
    if not isinstance(batch, Mapping):
        batch = batch._asdict() if hasattr(batch, "_asdict") else getattr(batch, "__dict__", {})
    return {name: value for name, value in batch.items() if value is not None and isinstance(name, str)}


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
    valid, attended = _read_attention(given.get("attention_mask"), shape, cached=cached)
    explicit = next((name for name in BOUNDARIES[:-1] if given.get(name) is not None), None)
    if explicit is not None:
        document_ids, inside = _read_documents(explicit, given[explicit], shape)
        valid = inside if valid is None else valid if inside is None else valid & inside
    else:
        begins = [attended, _read_positions(given.get("position_ids"), shape)]
        found = [one for one in begins if one is not None]
        document_ids = torch.stack(found).any(dim=0).long().cumsum(dim=1) if found else None
        if document_ids is None:
            document_ids = _numbered_in(given.get("attention_mask"))
    mask = given.get("attention_mask")
    square = attended is not None and explicit is None and pad_id is not None  # pads may attend themselves there
    if document_ids is not None and (mask is None or square):
        real = _without_lonely_pads(given, document_ids, pad_id, on_the_left=square)
        valid = real if valid is None else valid if real is None else valid & real
    return valid, document_ids


def token_shape(given: Mapping[str, Any]) -> Shape:
    """Return (B, T) of the tokens that a batch or a call holds; ValueError where nothing tells."""
    for name in (*TOKENS, "labels", "document_ids", "seq_idx", "attention_mask", "position_ids"):
        value = given.get(name)
        if isinstance(value, Tensor) and value.dim() >= 2:
            if name in ("attention_mask", "position_ids") and value.dim() > 2:
                B, T = (value.shape[0], value.shape[-1]) if name == "attention_mask" else value.shape[-2:]
            else:
                B, T = value.shape[:2]
            return int(B), int(T)
    raise ValueError(f"the shape [B, T] of the tokens cannot be told from {sorted(given)}: give masks=")


def has_tokens(given: Mapping[str, Any]) -> bool:
    """Return whether ``given`` holds tokens, as ids or embedded."""
    return any(isinstance(given.get(name), Tensor) and given[name].dim() >= 2 for name in TOKENS)


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


def token_ids(batch: Any) -> Tensor | None:
    """Return the [B, T] token ids of a batch: ``input_ids`` of a mapping, the first of a sequence, or the batch itself.

    Example:
        >>> token_ids((torch.tensor([[3, 1, 2]]), "anything")).shape
        torch.Size([1, 3])
    """
    if isinstance(batch, Mapping):
        ids = batch.get("input_ids")
    else:
        ids = batch[0] if isinstance(batch, tuple | list) and batch else batch
    is_ids = isinstance(ids, Tensor) and ids.dim() == 2 and not (ids.is_floating_point() or ids.is_complex())
    return ids if is_ids else None


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


def _refuse(name: str, value: Any, shape: Shape) -> ValueError:
    got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    return ValueError(
        f"{name} must describe tokens of shape [B, T] = {list(shape)}, got {got}: give masks=, a function that returns "
        "(valid, document_ids) of the tokens that the routers saw"
    )


def _read_attention(mask: Any, shape: Shape, *, cached: bool) -> Masks:
    """Return which tokens are attended at all and, of square masks, which do not attend the token before them."""
    if mask is None:
        return None, None
    if isinstance(mask, Mapping):
        return _read_attentions(mask, shape, cached=cached)
    B, T = shape
    if callable(getattr(mask, "mask_mod", None)):  # of flex attention
        return _read_function(mask, shape)
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 3, 4) or mask.shape[0] not in (1, B):
        raise _refuse("attention_mask", mask, shape)
    attended = _attended(mask)
    if mask.dim() == 4:
        attended = attended.any(dim=1)
    elif mask.dim() == 2:
        attended = attended[:, None]
    queries, keys = attended.shape[1:]
    if queries not in (1, T) or not (keys == T or (keys > T and cached)):
        raise _refuse("attention_mask", mask, shape)
    attended = attended[..., -T:]  # a tuned prefix comes before the tokens
    if queries == 1:
        return attended[:, 0].expand(B, T), None
    valid = attended.diagonal(dim1=1, dim2=2) & ~_unmasked_pads(attended) & ~_passed_pads(attended)
    begins = torch.zeros_like(valid)
    begins[:, 1:] = ~attended.diagonal(-1, 1, 2)
    return valid.expand(B, T), begins.expand(B, T)


def _read_attentions(masks: Mapping[str, Any], shape: Shape, *, cached: bool) -> Masks:
    """Read a mask for each kind of attention layer: a token is real where one of them attends it.

    A mask of chunks does not tell where documents begin. None, as a kind has where causal attention is all there is,
    tells nothing.
    """
    read = {kind: _read_attention(mask, shape, cached=cached) for kind, mask in masks.items()}
    valid = [one for one, _ in read.values() if one is not None]
    begins = [one for kind, (_, one) in read.items() if one is not None and "chunk" not in str(kind)]
    return (
        torch.stack(valid).any(dim=0) if valid else None,
        torch.stack(begins).all(dim=0) if begins else None,
    )


def _read_function(mask: Any, shape: Shape) -> Masks:
    """Read a mask of flex attention, ``mask_mod(batch, head, query, key)``."""
    B, T = shape
    device = mask.kv_num_blocks.device
    row, token = torch.arange(B, device=device)[:, None], torch.arange(T, device=device)[None]
    head = torch.zeros((), dtype=torch.long, device=device)
    valid = mask.mask_mod(row, head, token, token).expand(B, T)
    begins = torch.zeros_like(valid)
    begins[:, 1:] = ~mask.mask_mod(row, head, token[:, 1:], token[:, :-1]).expand(B, T - 1)
    return valid, begins


def _attended(mask: Tensor) -> Tensor:
    """Return where a mask lets attend, whatever its kind: bool, 0 and 1, or what is added to the scores."""
    if not mask.is_floating_point():
        return mask != 0
    added = (mask < 0).any() | (mask == 0).all()  # decided on the device: no host waits
    return torch.where(added, mask > NOT_ATTENDED, mask != 0)


def _unmasked_pads(attended: Tensor) -> Tensor:
    """Return which queries of a causal [B, T, T] mask are pads that attend everything.

    The memory-efficient kernels want no query without a key, so some masks let pads on the left attend all.
    """
    everything, future = attended.all(dim=-1), attended.triu(1).any(dim=-1)
    causal = ~(future & ~everything).any()
    one_way = attended.diagonal(dim1=1, dim2=2)[:, 1:] & ~attended.diagonal(1, 1, 2)  # from later tokens alone
    return everything & future & causal & (~everything.all(dim=1, keepdim=True) | one_way.any())


def _passed_pads(attended: Tensor) -> Tensor:
    """Return which tokens of a [B, T, T] mask are pads on the right that attend themselves and the row's tokens.

    Kernels want no query without a key. No later token attends such a pad, and it or the next one attends tokens before
    its predecessor, but not that predecessor, although that attends itself.
    """
    itself, past = attended.diagonal(dim1=1, dim2=2), attended.tril(-1)
    around = past.any(dim=2)
    around[:, 0] = False
    around[:, 1:] &= itself[:, :-1] & ~attended.diagonal(-1, 1, 2)
    passed = around.clone()
    passed[:, :-1] |= around[:, 1:]
    return passed & ~past.any(dim=1)


def _run_at_end(marked: Tensor, least: int) -> Tensor:
    """Return which of [B, T] are in the run of marked ones that ends a row, if it has at least so many."""
    run = marked.flip(1).long().cumprod(dim=1).flip(1).bool()
    return run & run[:, -least:].all(dim=1, keepdim=True)


def _read_documents(name: str, value: Any, shape: Shape) -> Masks:
    """Return explicit document ids, and which tokens belong to one where that is told too."""
    if not isinstance(value, Tensor):
        raise _refuse(name, value, shape)
    B, T = shape
    if name in CUMULATIVE:
        ends = value.flatten()[1:]
        token = torch.arange(B * T, device=value.device)
        document_ids = torch.bucketize(token, ends.to(token.dtype), right=True)
        return document_ids.view(B, T), (token < ends[-1]).view(B, T)
    if value.shape not in ((B, T), (1, T)):
        raise _refuse(name, value, shape)
    document_ids = value if len(value) == B else value.expand(B, T)
    return document_ids, document_ids >= 0 if name == "seq_idx" else None


def _read_positions(positions: Any, shape: Shape) -> Tensor | None:
    """Return where documents begin by [B, T] positions, or by those of text and pictures, [3 or 4, B, T]."""
    if positions is None:
        return None
    if not isinstance(positions, Tensor):
        raise _refuse("position_ids", positions, shape)
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
        raise _refuse("position_ids", positions, shape)
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
    return mask.long() if mask.is_cuda or bool((mask > 1).any()) else None  # a GPU's host does not wait


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


def named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a module's forward by name, without those that are None.

    Example:
        >>> named_arguments(nn.Linear(2, 2), (1,), {})
        {'input': 1}
    """
    names = inspect.signature(module.forward).parameters if args else ()  # a signature takes as long as a small layer
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    return {name: value for name, value in given.items() if value is not None}
