"""Choose the experts of one more token by routing that knows the cache, on a CPU: what a token of decoding waits for.

The equations are those of "prior" in :mod:`consistency_reg.functional.cache_aware`. NumPy's operations on a few numbers
take a fraction of the time of PyTorch's. R rows (of all layers that are worked on together), E experts, K chosen.
"""

import numpy as np
import torch
from torch import Tensor


def next_on_host(
    z_RE: Tensor,
    last_use_RE: Tensor,
    score_range_R: Tensor,
    tokens_R: Tensor,
    *,
    top_k: int,
    slots: int,
    strength: float,
    guaranteed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the choice for one token of each row and the caches around it.

    Args:
        z_RE: scores, floating point, on the CPU as all of these.
        last_use_RE, score_range_R, tokens_R: the caches before the token, as in
            :class:`~consistency_reg.functional.cache_aware.CacheAwareState`; they are not changed.
        top_k: K.
        slots: C.
        strength: of the bonus.
        guaranteed: so many best experts are chosen always.

    Returns:
        The chosen experts [R, K] int64 in the order of the scores, the residents before the token [R, E] bool, and the
        caches after it in the form of ``last_use_RE``, ``score_range_R`` and ``tokens_R``.

    Example:
        >>> z, caches = torch.tensor([[2.0, 1.9, 0.0]]), map(torch.tensor, ([[0, 3, 0]], [2.0], [1]))
        >>> options = {"top_k": 1, "slots": 1, "strength": 0.1, "guaranteed": 0}
        >>> chosen, residents, after, *_ = next_on_host(z, *caches, **options)
        >>> chosen.tolist(), residents.tolist(), after.tolist()
        ([[1]], [[False, True, False]], [[0, 5, 0]])
    """
    z, last_use, tokens = z_RE.numpy(), last_use_RE.numpy(), tokens_R.numpy() + 1
    (R, E), at_least = z.shape, max(z.shape[1] - slots, 0)
    row_R1 = np.arange(R)[:, None]
    score_range = score_range_R.numpy() + _score_range(z)
    bonus = (strength * (score_range / tokens)).astype(z.dtype)
    residents = last_use >= np.maximum(np.partition(last_use, at_least, axis=1)[:, at_least, None], 1)
    order = np.argsort(-z, axis=1, kind="stable")
    value = np.where(residents, z + bonus[:, None], z)
    value[row_R1, order[:, :guaranteed]] = np.inf
    best_RK = torch.from_numpy(value).topk(top_k, sorted=False).indices.numpy()  # breaks ties as the scan does
    rank = np.empty_like(order)
    rank[row_R1, order] = np.arange(E)
    rank_RK = np.sort(rank[row_R1, best_RK], axis=1)
    chosen = order[row_R1, rank_RK]
    after = last_use.copy()
    after[row_R1, chosen] = tokens[:, None] * E - rank_RK
    as_tensor = torch.from_numpy
    return as_tensor(chosen), as_tensor(residents), as_tensor(after), as_tensor(score_range), as_tensor(tokens)


def _score_range(z: np.ndarray) -> np.ndarray:
    """Return ``max(z) - min(z)`` of each row [R] float64; scores of minus infinity are not counted."""
    lowest = z.min(axis=1)
    if (lowest == -np.inf).any():
        lowest = np.where(z == -np.inf, np.inf, z).min(axis=1)
    return np.maximum(z.max(axis=1) - lowest, 0).astype(np.float64)
