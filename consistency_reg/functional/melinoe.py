"""Compute Melinoe's soft cache (arXiv 2602.11192).

Means divide by what was counted and are 0, with a graph, where there was nothing to count.

B rows, T tokens, E routed experts of the layer, K active per token, p the router's distribution.
"""

import torch
from torch import Tensor

CHUNK = 64  # tokens that one matrix product of discounted_sums covers


def discounted_sums(values: Tensor, position: Tensor, decay: float) -> Tensor:
    """Return ``out[t] = sum of decay^(t-1-u) * values[u]`` over the tokens u before t of t's document: [B, T, E].

    A chunk of tokens is one matrix product, and what lies before it one carried state: exact, and T / 64 steps.

    Example:
        >>> discounted_sums(torch.ones(1, 4, 1), torch.tensor([[0, 1, 2, 0]]), 0.5).flatten().tolist()
        [0.0, 1.0, 1.5, 0.0]
    """
    B, T, E = values.shape
    carried, chunks = values.new_zeros(B, E), [values[:, :0]]
    for first in range(0, T, CHUNK):
        chunk_BME, position_BM = values[:, first : first + CHUNK], position[:, first : first + CHUNK]
        index_M = torch.arange(chunk_BME.shape[1], device=values.device)
        gap_MM = index_M[:, None] - index_M
        discount_MM = decay ** (gap_MM - 1).clamp_min(0).to(values.dtype)
        weight_BMM = discount_MM.where((gap_MM > 0) & (gap_MM <= position_BM[:, :, None]), 0)
        carry_BM = (decay ** index_M.to(values.dtype)).where(position_BM > index_M, 0)
        sums_BME = weight_BMM @ chunk_BME + carry_BM[:, :, None] * carried[:, None]
        carried = decay * sums_BME[:, -1] + chunk_BME[:, -1]
        chunks.append(sums_BME)
    return torch.cat(chunks, dim=1)


def soft_cache(requests: Tensor, position: Tensor, slots: float, top_k: int, decay: float) -> Tensor:
    """Return what a cache of ``slots`` would hold before each token, its recent requests counting most: [B, T, E].

    ``c' = (decay * Z * c + r) / Z'`` with ``Z' = decay * Z + K / slots``, so that c always sums to ``slots``. A
    document starts with ``c = slots / E`` everywhere and ``Z = 1``.

    Args:
        requests: r, [B, T, E] with K experts requested per token, 0 on padding.
        position: [B, T] index of each token in its document, -1 on padding.
        slots: C, cache slots, any positive number.
        top_k: K.
        decay: in [0, 1]; 0 knows the last token only, 1 counts all uses alike.

    Example:
        >>> soft_cache(torch.eye(2)[None, [0, 0]], torch.tensor([[0, 1]]), slots=1, top_k=1, decay=0.5)
        tensor([[[0.5000, 0.5000],
                 [0.8333, 0.1667]]])
    """
    E = requests.shape[-1]
    age_BT = position.clamp_min(0).to(requests.dtype)
    left_BT = decay**age_BT  # of Z = 1 that the document started with
    added_BT = age_BT if decay == 1 else (1 - left_BT) / (1 - decay)  # the geometric sum of the decays
    normalizer_BT = left_BT + added_BT * (top_k / slots)
    held_BTE = discounted_sums(requests, position, decay) + left_BT[:, :, None] * (slots / E)
    return held_BTE / normalizer_BT[:, :, None]
