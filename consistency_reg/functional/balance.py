"""Balance of the experts' usage: over the whole data, within a segment or a document, and from token to token.

Global balance can coexist with consistency, local balance cannot (arXiv 2505.16056): look at both. B rows, T tokens,
K active of E routed experts of one layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from consistency_reg.devices import is_on_host
from consistency_reg.functional.pairs import has_predecessor
from consistency_reg.functional.segments import active_experts, running_sums, window_ends
from consistency_reg.routing import check_expert_ids, check_id_shape, check_masks
from consistency_reg.routing.documents import chunks_with_positions, document_ends, row_chunks

CHUNK_TOKENS = 8192  # bounds the memory whatever B is


@dataclass(frozen=True)
class UsageBalance:
    """Balance of the usage shares ``q[e] = usage[e] / tokens``, which sum to K; float64, of the layers' shape.

    Attributes:
        sd: standard deviation of the shares in percentage points, the paper's "LB".
        cv: the standard deviation over the mean; 0 for perfect balance, ``sqrt(E/K - 1)`` for a collapsed router.
        max_over_mean: the largest share over the fair share K/E.
        min_share: the smallest share over the fair share K/E; 0 when an expert is dead.
    """

    sd: Tensor
    cv: Tensor
    max_over_mean: Tensor
    min_share: Tensor


@dataclass(frozen=True)
class Mean:
    """Holds an average that adds up over batches: what was counted and how often.

    Attributes:
        total: a scalar.
        count: int64, a scalar.
    """

    total: Tensor
    count: Tensor

    @property
    def value(self) -> Tensor:
        """total / count in float64; 0 where nothing was counted."""
        return self.total.double() / self.count.clamp_min(1)


def usage_counts(expert_ids: Tensor, num_experts: int, valid: Tensor | None = None) -> Tensor:
    """Count the valid tokens on which each expert is active: [B, T, K] ids -> [E] int64. The host waits for no device.

    Example:
        >>> usage_counts(torch.tensor([[[0, 1], [1, 2]]]), num_experts=4)
        tensor([1, 2, 1, 0])
    """
    check_id_shape(expert_ids, num_experts)
    bins = torch.zeros(num_experts + 1, dtype=torch.int64, device=expert_ids.device)
    for rows in row_chunks(len(expert_ids), expert_ids.shape[1], CHUNK_TOKENS):
        ids_BTK = expert_ids[rows]
        if valid is not None:
            ids_BTK = ids_BTK.where(valid[rows, :, None], num_experts)  # a bin for padding
        bins.scatter_add_(0, ids_BTK.flatten(), torch.ones_like(ids_BTK).flatten())
    return bins[:num_experts]


def usage_balance(usage: Tensor, tokens: Tensor) -> UsageBalance:
    """Return the balance over the whole data from the counts of :func:`usage_counts`.

    Args:
        usage: [..., E] integers, tokens on which each expert is active.
        tokens: valid tokens, a scalar or [...].

    Returns:
        float64 [...]; 0 throughout where there are no tokens.

    Example:
        >>> balance = usage_balance(torch.tensor([3, 1, 0, 0]), torch.tensor(4))
        >>> [round(float(x), 3) for x in (balance.sd, balance.cv, balance.max_over_mean, balance.min_share)]
        [30.619, 1.225, 3.0, 0.0]
    """
    share = usage / tokens.clamp_min(1).double()[..., None]
    mean = share.mean(dim=-1)
    sd = share.std(dim=-1, correction=0)
    fair = mean.where(mean > 0, 1.0)
    return UsageBalance(100 * sd, sd / fair, share.amax(dim=-1) / fair, share.amin(dim=-1) / fair)


def local_cv(
    expert_ids: Tensor,
    num_experts: int,
    segment_length: int | None = None,
    valid: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> Tensor:
    """Return the local balance: the mean CV of the experts' usage within a segment or a document, a float64 scalar.

    ``CV = sqrt(E sum_e f[e]^2 / (sum_e f[e])^2 - 1)`` with f the usage within the segment, averaged over all segments.

    Args:
        expert_ids: [B, T, K] int64.
        num_experts: E.
        segment_length: m, over every window of m tokens of a document; None for one value per document.
        valid: [B, T] bool, True for real tokens.
        document_ids: [B, T] integers.

    Raises:
        TypeError, ValueError: as :func:`consistency_reg.routing.check_expert_ids`; m < 1.

    Example:
        >>> ids = torch.tensor([[[0], [0], [1], [1]]])
        >>> float(local_cv(ids, num_experts=2)), round(float(local_cv(ids, 2, segment_length=2)), 3)
        (0.0, 0.667)
    """
    check_expert_ids(expert_ids, num_experts, valid)
    return local_cv_means(expert_ids, num_experts, [segment_length], valid, document_ids)[segment_length].value


def local_cv_means(
    expert_ids: Tensor,
    num_experts: int,
    segment_lengths: Sequence[int | None],
    valid: Tensor | None = None,
    document_ids: Tensor | None = None,
    *,
    chunk_tokens: int = CHUNK_TOKENS,
) -> dict[int | None, Mean]:
    """Return :func:`local_cv` for several m in one pass, as sums and counts that add up over batches.

    On CUDA the host does not wait, so ids are not checked.
    """
    for m in segment_lengths:
        if m is not None and m < 1:
            raise ValueError(f"segment_length must be at least 1 token or None for whole documents, got {m}")
    check_id_shape(expert_ids, num_experts)
    B, T, _ = expert_ids.shape
    check_masks((B, T), valid, document_ids)
    device = expert_ids.device
    totals = {m: torch.zeros((), dtype=torch.float64, device=device) for m in segment_lengths}
    counts = {m: torch.zeros((), dtype=torch.int64, device=device) for m in segment_lengths}
    sum_dtype = torch.int16 if T < 2**15 else torch.int32
    for _, ids_BTK, valid_BT, position_BT in chunks_with_positions(expert_ids, valid, document_ids, chunk_tokens):
        active_BTE = active_experts(ids_BTK, num_experts, valid_BT)
        before_BTE = pad(running_sums(active_BTE, sum_dtype), (0, 0, 1, 0))  # [B, T+1, E]
        for m in segment_lengths:
            ends_BT, length_BT = _segments(position_BT, m)
            totals[m] += _cv(_segment_usage(before_BTE, ends_BT, length_BT)).sum()
            counts[m] += ends_BT.sum()
    return {m: Mean(totals[m], counts[m]) for m in segment_lengths}


def overlap_rate(
    expert_ids: Tensor, num_experts: int, valid: Tensor | None = None, document_ids: Tensor | None = None
) -> Tensor:
    """Return the share of a token's experts that its predecessor in the document used too, a float64 scalar.

    Example:
        >>> float(overlap_rate(torch.tensor([[[0, 1], [1, 2], [1, 2]]]), num_experts=4))
        0.75
    """
    check_expert_ids(expert_ids, num_experts, valid)
    return overlap_mean(expert_ids, num_experts, valid, document_ids).value


def overlap_mean(
    expert_ids: Tensor,
    num_experts: int,
    valid: Tensor | None = None,
    document_ids: Tensor | None = None,
    *,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Mean:
    """Return :func:`overlap_rate` as integers that add up over batches. The host waits for no device."""
    check_id_shape(expert_ids, num_experts)
    B, T, K = expert_ids.shape
    check_masks((B, T), valid, document_ids)
    shared, pairs = torch.zeros(2, dtype=torch.int64, device=expert_ids.device)
    for _, ids_BTK, valid_BT, position_BT in chunks_with_positions(expert_ids, valid, document_ids, chunk_tokens):
        follows_BT = has_predecessor(position_BT, 1)
        active_BTE = active_experts(ids_BTK, num_experts, valid_BT)
        shared_BT = (active_BTE[:, 1:] & active_BTE[:, :-1]).sum(dim=-1)
        shared += shared_BT.where(follows_BT, 0).sum()
        pairs += follows_BT.sum()
    return Mean(shared, K * pairs)


def _segments(position_BT: Tensor, segment_length: int | None) -> tuple[Tensor, Tensor]:
    """Return where segments end, [B, T] bool, and how many tokens a segment that ends there has, [B, T]."""
    if segment_length is None:
        return document_ends(position_BT), position_BT + 1
    return window_ends(position_BT, segment_length), torch.full_like(position_BT, segment_length)


def _segment_usage(before_BTE: Tensor, ends_BT: Tensor, length_BT: Tensor) -> Tensor:
    """Return the usage within each segment, [S, E], from that of the tokens before each place of a row, [B, T+1, E]."""
    before_SE = before_BTE.flatten(0, 1)
    after_BT = torch.arange(len(before_SE), device=before_SE.device).view(before_BTE.shape[:2])[:, 1:]
    if is_on_host(before_SE):
        after_S, length_S = after_BT[ends_BT], length_BT[ends_BT]
    else:  # to select the ends would make the host wait: take every token, with an empty segment where none ends
        after_S, length_S = after_BT.flatten(), length_BT.where(ends_BT, 0).flatten()
    return before_SE[after_S] - before_SE[after_S - length_S]


def _cv(usage: Tensor) -> Tensor:
    """Return the CV over the last dimension, from exact sums; 0 where nothing is used."""
    usage = usage.double()
    squares, total = usage.square().sum(dim=-1), usage.sum(dim=-1)
    return (usage.shape[-1] * squares / total.square().clamp_min(1)).sub(1).clamp_min(0).sqrt()
