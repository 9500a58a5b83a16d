"""The scan of :mod:`consistency_reg.functional.cache_aware` along the tokens of a row.

Each token is a few operations on all rows at once: a choice, and the last uses that follow from it. On a GPU one kernel
does them all, see :mod:`consistency_reg.kernels.cache_aware`.

R rows of all layers together, T tokens, E experts, K chosen per token, C slots.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from consistency_reg import devices


class Scanned(NamedTuple):
    """Holds the choice and the caches of a scan, see :func:`scan`."""

    expert_ids: Tensor  # [..., B, T, K] int64, in any order
    residents: Tensor  # [..., B, T, E] bool, the experts in the cache before each token
    last_use: Tensor  # [..., B, E] int64, after the last token


def scan(
    base: Tensor,
    preferred: Tensor,
    key: Tensor,
    start: Tensor,
    last_use: Tensor,
    top_k: int,
    slots: int,
    own_ids: Tensor | None = None,
) -> Scanned:
    """Choose token by token: the K highest of ``preferred`` for experts in the cache and of ``base`` for the others.

    Args:
        base, preferred: [..., B, T, E].
        key: [..., B, T, E] int64, the last use of each expert if it is chosen now; grows along a row.
        start: [..., B, T] int64; experts of the token's document have a last use above it.
        last_use: [..., B, E] int64 before the first token.
        top_k, slots: K and C.
        own_ids: [..., B, T, K] int64, a choice that is already made; nothing is chosen here then.

    Example:
        >>> base, key = torch.tensor([[[3.0, 2.0], [1.9, 2.0]]]), torch.tensor([[[2, 1], [3, 4]]])
        >>> found = scan(base, base + 0.5, key, torch.zeros(1, 2).long(), torch.zeros(1, 2).long(), 1, 1)
        >>> found.expert_ids.tolist(), found.residents.tolist()
        ([[[0], [0]]], [[[False, False], [True, False]]])
    """
    if devices.has_kernels(base):
        from consistency_reg.kernels import cache_aware

        return Scanned(*cache_aware.scan(base, preferred, key, start, last_use, top_k, slots, own_ids))
    if not devices.is_on_host(base):
        base_, preferred, key, start, last_use = (x.cpu() for x in (base, preferred, key, start, last_use))
        own_ids = None if own_ids is None else own_ids.cpu()
        scanned = scan(base_, preferred, key, start, last_use, top_k, slots, own_ids)
        return Scanned(*(values.to(base.device) for values in scanned))
    T, E = base.shape[-2:]
    R, K = last_use[..., 0].numel(), top_k
    by_token = [values.reshape(R, T, -1).transpose(0, 1).contiguous() for values in (base, preferred, key, start + 1)]
    ids_TRK = torch.empty(T, R, K, dtype=torch.int64, device=base.device)
    if own_ids is not None:
        ids_TRK.copy_(own_ids.reshape(R, T, K).transpose(0, 1))
    residents_TRE = torch.empty(T, R, E, dtype=torch.bool, device=base.device)
    last_use_RE = last_use.reshape(R, E).clone()
    _step_along(by_token, last_use_RE, min(slots, E), ids_TRK, residents_TRE, choose=own_ids is None)
    ids, residents = (values.transpose(0, 1) for values in (ids_TRK, residents_TRE))
    shape = base.shape[:-1]
    return Scanned(ids.reshape(*shape, K), residents.reshape(*shape, E), last_use_RE.view(last_use.shape))


@torch.inference_mode()  # half the cost of a small operation
def _step_along(
    by_token: Sequence[Tensor],
    last_use_RE: Tensor,
    slots: int,
    ids_TRK: Tensor,
    residents_TRE: Tensor,
    *,
    choose: bool,
) -> None:
    """Write ids, residents and last use, all of which come from outside the inference mode.

    ``by_token`` are the preferences outside and inside the cache, the keys and the oldest last use: [T, R, ...] each.
    """
    R, K = ids_TRK.shape[1:]
    base_TRE, _, key_TRE, _ = by_token
    value_RE, value_RK, used_RK = torch.empty_like(base_TRE[0]), base_TRE.new_empty(R, K), key_TRE.new_empty(R, K)
    recent_RC, place_RC, lowest_R1 = (key_TRE.new_empty(R, size) for size in (slots, slots, 1))
    least_recent_R1 = recent_RC[:, -1:]
    topk, maximum, ge, where, gather = torch.topk, torch.maximum, torch.ge, torch.where, torch.gather
    rows = (values.unbind(0) for values in (*by_token, ids_TRK, residents_TRE))
    for base, preferred, key, oldest, ids, residents in zip(*rows, strict=True):
        topk(last_use_RE, slots, out=(recent_RC, place_RC))
        maximum(least_recent_R1, oldest, out=lowest_R1)
        ge(last_use_RE, lowest_R1, out=residents)
        if choose:
            where(residents, preferred, base, out=value_RE)
            topk(value_RE, K, out=(value_RK, ids))
        gather(key, 1, ids, out=used_RK)
        last_use_RE.scatter_(1, ids, used_RK)
