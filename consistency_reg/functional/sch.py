"""Segment cache best hit rate (SCH): the hit rate of a cache that knows how often each expert is used soon.

Source: arXiv 2505.16056. The cache of :mod:`~consistency_reg.functional.cache`, with this priority: the uses in the
window of m tokens that starts at the present token and that are not served yet; ties fall to the more recent use.

N rows, T tokens, K active of E routed experts, D documents, m segment length.
"""

from collections.abc import Sequence

from torch import Tensor

from consistency_reg.functional.cache import HitCounts, count_hits, mean_hit_rate, one_cache


def sch(
    expert_ids: Tensor | Sequence[Tensor],
    num_experts: int | Sequence[int],
    segment_length: int,
    valid: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> Tensor:
    """SCH of one layer for every cache size, the mean over documents of equal weight.

    Args:
        expert_ids: [N, T, K] int64, one layer; or a list with one for each layer, for one cache that all layers share
            (the accesses of a token are those of the first layer, then those of the second, ...): the SCH of a model.
        num_experts: E; one for all layers or one for each.
        segment_length: m in tokens.
        valid: [N, T] bool, True for real tokens; all when None.
        document_ids: [N, T] integers; one document a row when None.

    Returns:
        [E] float64, the hit rate with a cache of 1, 2, ..., E slots (the sum of E for a list of layers).

    Raises:
        TypeError: ids that are not int64, masks of a wrong dtype.
        ValueError: shapes that do not match, K > E, ids out of range or repeated within a token, m < 1, no valid token.

    Example:
        >>> import torch
        >>> ids = torch.tensor([[[0, 1], [0, 2], [0, 1], [0, 2]]])
        >>> sch(ids, 3, segment_length=3)
        tensor([0.1250, 0.6250, 1.0000], dtype=torch.float64)
    """
    ids, E = one_cache(expert_ids, num_experts, valid, document_ids)
    return mean_hit_rate(sch_counts(ids, E, segment_length, valid, document_ids))


def sch_counts(
    expert_ids: Tensor,
    num_experts: int,
    segment_length: int,
    valid: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> HitCounts:
    """The hits of each document, see :func:`sch`. Ids are not checked, only their shape.

    Layers of equal E and K may stand below each other as more rows: they are simulated at once.

    Example:
        >>> import torch
        >>> sch_counts(torch.tensor([[[0], [1], [0]]]), 2, segment_length=2).hits.tolist()
        [[1, 3]]
    """
    return count_hits(expert_ids, num_experts, "sch", valid, document_ids, segment_length)
