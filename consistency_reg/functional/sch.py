"""Segment cache best hit rate (SCH): the hit rate of a cache that knows how often each expert is used soon.

Source: arXiv 2505.16056. The cache of :mod:`~consistency_reg.functional.cache_hits`, with this priority: the uses in
the window of m tokens that starts at the present token and that are not served yet; ties fall to the more recent use.

N rows, T tokens, K active of E routed experts, m segment length.
"""

from collections.abc import Sequence

from torch import Tensor

from consistency_reg.functional.cache_hits import checked_trace, mean_over_documents
from consistency_reg.functional.cache_simulation import Simulation, simulate


def sch(
    expert_ids: Tensor | Sequence[Tensor],
    num_experts: int | Sequence[int],
    segment_length: int,
    valid: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> Tensor:
    """Return the SCH of one layer for every cache size, ``hits / (T K)`` as the mean over documents of equal weight.

    Args:
        expert_ids: [N, T, K] int64 of one layer; or a list with one for each layer: the SCH of a model, which has one
            cache that all layers share.
        segment_length: m in tokens.
        num_experts, valid, document_ids: see :func:`~consistency_reg.functional.cache_hits.cache_hit_rate`, which also
            says what is raised.

    Returns:
        [E] float64, the hit rate with a cache of 1, 2, ..., E slots (the sum of E for a list of layers).

    Example:
        >>> import torch
        >>> ids = torch.tensor([[[0, 1], [0, 2], [0, 1], [0, 2]]])
        >>> sch(ids, 3, segment_length=3)
        tensor([0.1250, 0.6250, 1.0000], dtype=torch.float64)
    """
    trace = checked_trace(expert_ids, num_experts, valid, document_ids)
    parts = simulate(trace, Simulation("sch", segment_length))
    return mean_over_documents((part.hit_rate, len(part.rows)) for part in parts)
