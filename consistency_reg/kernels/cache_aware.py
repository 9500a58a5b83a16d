"""The scan of :mod:`consistency_reg.functional.cache_aware_scan` on a GPU: one program walks along a row.

The experts of a layer are the lanes of registers that hold, for each, its last use and its depth: how many experts were
used after it. An expert is in a cache of C slots where its depth is below C and its document has used it.

R rows of all layers together, T tokens, E experts, K chosen per token, C slots, X = E rounded up to a power of two.
"""
# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False

import torch
import triton
import triton.language as tl
from torch import Tensor

LOWEST = tl.constexpr(-3.4e38)  # what a score of minus infinity counts as: above experts that are chosen already


def scan(
    base: Tensor,
    preferred: Tensor,
    key: Tensor,
    start: Tensor,
    last_use: Tensor,
    top_k: int,
    slots: int,
    own_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what :func:`consistency_reg.functional.cache_aware_scan.scan` returns for the same arguments.

    Of equal scores the lower expert id is chosen. Never makes the host wait.
    """
    T, E = base.shape[-2:]
    ids = torch.empty(*base.shape[:-1], top_k, dtype=torch.int64, device=base.device) if own_ids is None else own_ids
    ids = ids.contiguous()
    residents = torch.empty(base.shape, dtype=torch.bool, device=base.device)
    depth = last_use.argsort(dim=-1, descending=True).argsort(dim=-1).int()
    last_use = last_use.clone(memory_format=torch.contiguous_format)
    with torch.cuda.device_of(base):  # Triton launches on the current one
        _walk[(last_use[..., 0].numel(),)](
            *(values.contiguous() for values in (base, preferred, key, start)),
            last_use,
            depth,
            ids,
            residents.view(torch.uint8),
            T,
            E,
            top_k,
            slots,
            CHOOSE=own_ids is None,
            X=max(triton.next_power_of_2(E), 2),
            num_warps=max(1, min(8, E // 64)),
        )
    return ids, residents, last_use


@triton.jit
def _walk(
    base, preferred, key, start, last_use, depth, ids, residents, T, E, K, C, CHOOSE: tl.constexpr, X: tl.constexpr
):
    """Choose the experts of a row's tokens and write them, the experts in the cache before each, and the last uses."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, X)
    is_expert = lanes < E
    last = tl.load(last_use + row * E + lanes, mask=is_expert, other=0)
    deep = tl.load(depth + row * E + lanes, mask=is_expert, other=X)
    for t in range(0, T):
        token = row * T + t
        place = token * E + lanes
        resident = (deep < C) & (last > tl.load(start + token))
        tl.store(residents + place, resident.to(tl.uint8), mask=is_expert)
        used_at = tl.load(key + place, mask=is_expert, other=0)
        if CHOOSE:
            inside = tl.load(preferred + place, mask=is_expert, other=0)
            outside = tl.load(base + place, mask=is_expert, other=0)
            score = tl.where(is_expert, tl.maximum(tl.where(resident, inside, outside), LOWEST), float("-inf"))
        chosen = lanes < 0
        sinks = tl.zeros((X,), tl.int32)
        new_depth = tl.zeros((X,), tl.int32)
        for k in range(0, K):
            if CHOOSE:
                expert = tl.argmax(score, 0)
                tl.store(ids + token * K + k, expert.to(tl.int64))
            else:
                expert = tl.load(ids + token * K + k).to(tl.int32)
            own = lanes == expert
            if CHOOSE:
                score = tl.where(own, float("-inf"), score)
            chosen = chosen | own
            sinks += (deep < tl.sum(tl.where(own, deep, 0), 0)).to(tl.int32)
            new_depth += (used_at < tl.sum(tl.where(own, used_at, 0), 0)).to(tl.int32)
        deep = tl.where(chosen, new_depth, deep + sinks)
        last = tl.where(chosen, used_at, last)
    tl.store(last_use + row * E + lanes, last, mask=is_expert)
