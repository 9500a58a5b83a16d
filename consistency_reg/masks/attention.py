"""Read an attention mask in every form that models take: which tokens are real, and where documents begin."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from consistency_reg.masks.batches import Masks, Shape, misshapen

NOT_ATTENDED = -1000.0  # and less, in a mask that is added to scores


def read_attention(mask: Any, shape: Shape, *, cached: bool) -> Masks:
    """Return which tokens are attended at all and, of square masks, which do not attend the token before them."""
    if mask is None:
        return None, None
    if isinstance(mask, Mapping):
        return _read_attentions(mask, shape, cached=cached)
    B, T = shape
    if callable(getattr(mask, "mask_mod", None)):  # of flex attention
        return _read_function(mask, shape)
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 3, 4) or mask.shape[0] not in (1, B):
        raise misshapen("attention_mask", mask, shape)
    attended = _attended(mask)
    if mask.dim() == 4:
        attended = attended.any(dim=1)
    elif mask.dim() == 2:
        attended = attended[:, None]
    queries, keys = attended.shape[1:]
    if queries not in (1, T) or not (keys == T or (keys > T and cached)):
        raise misshapen("attention_mask", mask, shape)
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
    read = {kind: read_attention(mask, shape, cached=cached) for kind, mask in masks.items()}
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
