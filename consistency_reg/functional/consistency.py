"""The envelope gradient of local routing consistency: how much each activation is worth.

SRP is the best F1 over all thresholds. At the optimum the threshold does not move to first order (envelope theorem), so
its derivative with respect to the window counts needs the resident set held fixed, nothing else.

B rows, T tokens, E experts, K active per token, m segment length, G groups that share one threshold (1, or B rows).
``...`` stands for layers of one shape, which are worked on together, each by itself; or for nothing.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from consistency_reg.devices import is_on_host
from consistency_reg.functional.segments import along_tokens, covering_sums, window_ends
from consistency_reg.functional.srp import best_f1


class Marginals(NamedTuple):
    """Holds a value in [0, 1], the mean over the groups that had anything to count, and each activation's worth."""

    value: Tensor  # [...] float64; 0 where nothing was counted
    marginal: Tensor  # [..., B, T, E] float32, the derivative of value
    counted: Tensor  # [...] bool, whether there was anything to count


def count_histogram(counts: Tensor, ends: Tensor, segment_length: int, *, by_row: bool) -> Tensor:
    """Return the histogram of window counts, all experts pooled: H[g, j] counts the (expert, window) pairs with f = j.

    Args:
        counts: [..., B, T, E] integer, the window that ends at t (:func:`~.segments.window_sums`).
        ends: [B, T] bool, where a whole window ends.
        by_row: one group a row (G = B) instead of one for the batch (G = 1).

    Returns:
        [..., G, m+1] int64. No host synchronisation.
    """
    *layers, B, T, E = counts.shape
    if is_on_host(counts) and not by_row:  # counts stay int16 here, scatter_add_ needs int64
        batches = counts.reshape(-1, B, T, E)
        bins = [torch.bincount(batch[ends].flatten(), minlength=segment_length + 1) for batch in batches]
        return torch.stack(bins).view(*layers, 1, segment_length + 1)
    slot = counts.long().masked_fill_(~ends[:, :, None], segment_length + 1)  # the last slot takes what is no window
    histogram = slot.new_zeros(*layers, B, segment_length + 2, E)  # by expert too: fewer additions wait for each other
    histogram.scatter_add_(-2, slot, slot.new_ones(()).expand_as(slot))
    histogram = histogram[..., :-1, :].sum(dim=-1)
    return histogram if by_row else histogram.sum(dim=-2, keepdim=True)


def srp_marginals(counts: Tensor, position: Tensor, histogram: Tensor, segment_length: int) -> Marginals:
    """Return SRP of each group and its derivative by every activation a[e, t].

    ``dSRP/df[e, w] = (2*R[e, w] - F1) / D`` with the resident set ``R = [f >= threshold]`` and
    ``D = m*sum(R) + sum(f)``, summed over the windows that cover a token.

    Args:
        counts: [..., B, T, E] integer window counts.
        position: [B, T] index of each token in its document, -1 on padding.
        histogram: [..., G, m+1] of these counts, G in {1, B}; it may hold more windows (of other processes).
        segment_length: m.
    """
    best = best_f1(histogram, segment_length)
    counted_G = histogram.sum(dim=-1) > 0
    ends_BT = window_ends(position, segment_length)
    resident_BTE = (counts >= best.threshold[..., None, None]) & ends_BT[:, :, None]
    residencies_BTE = covering_sums(resident_BTE.to(counts.dtype), segment_length)
    windows_BT = covering_sums(ends_BT[:, :, None].to(counts.dtype), segment_length)
    size_G = (best.loaded + best.active).clamp_min(1)
    return _mean_over_groups(best.f1, size_G, counted_G, residencies_BTE, windows_BT)


def lru_residents(expert_ids: Tensor, num_experts: int, position: Tensor, slots: int) -> Tensor:
    """Return the experts that an LRU cache holds before each token: [..., B, T, K] ids -> [..., B, T, E] bool.

    The cache starts empty in every document. Within a token the experts are used in the router's order.

    Example:
        >>> ids = torch.tensor([[[0], [1], [2]]])
        >>> lru_residents(ids, 3, torch.tensor([[0, 1, 2]]), slots=1).int().tolist()
        [[[0, 0, 0], [1, 0, 0], [0, 1, 0]]]
    """
    T, K = expert_ids.shape[-2:]
    valid_BT1 = position[:, :, None] >= 0
    clock_TK = torch.arange(1, T * K + 1, dtype=torch.int32, device=expert_ids.device).view(T, K)
    used_at_BTK = torch.where(valid_BT1, clock_TK, 0).expand_as(expert_ids)
    last_use_BTE = torch.zeros(*expert_ids.shape[:-1], num_experts, dtype=torch.int32, device=expert_ids.device)
    ids_BTK = expert_ids.where(valid_BT1, torch.arange(K, device=expert_ids.device))
    last_use_BTE[..., 1:, :].scatter_(-1, ids_BTK[..., :-1, :], used_at_BTK[..., :-1, :])
    last_use_BTE = along_tokens(lambda rows, dim: rows.cummax(dim).values, last_use_BTE)
    document_start_BT = (torch.arange(T, device=position.device) - position) * K
    last_use_BTE.masked_fill_(last_use_BTE <= document_start_BT[:, :, None], 0)
    if slots < num_experts:
        oldest_BT1 = last_use_BTE.topk(slots, dim=-1).values[..., -1:]
        return (last_use_BTE >= oldest_BT1) & (last_use_BTE > 0)
    return last_use_BTE > 0


def hit_rate_marginals(residents: Tensor, active: Tensor, hits: Tensor, accesses: Tensor) -> Marginals:
    """Return the hit rate of a cache of known size and its derivative by every activation, the residents held fixed.

    The same construction as :func:`srp_marginals`, with the cache in the place of the segment's set:
    ``g[e, t] = (2*R[e, t] - hit rate) / (2 * accesses)``.

    Args:
        residents: [..., B, T, E] bool, resident before t.
        active: [..., B, T, E] integer activations, 0 on padding.
        hits: [..., G] hits of each group, G in {1, B}; with those of other processes if they share the group.
        accesses: [..., G] likewise.
    """
    hit_rate_G = hits.double() / accesses.clamp_min(1)
    valid_BT1 = (active.sum(dim=-1, keepdim=True) > 0).to(active.dtype)
    return _mean_over_groups(hit_rate_G, 2 * accesses.clamp_min(1), accesses > 0, residents, valid_BT1)


def _mean_over_groups(value: Tensor, size: Tensor, counted: Tensor, residencies: Tensor, windows: Tensor) -> Marginals:
    """Return the mean value of the counted groups and its derivative ``(2 * residencies - value * windows) / size``."""
    share_G = counted / counted.sum(dim=-1, keepdim=True).clamp_min(1)
    worth_G, cost_G = (2 * share_G / size).float(), (value * share_G / size).float()
    marginal_BTE = residencies.to(torch.float32, memory_format=torch.contiguous_format)
    marginal_BTE.mul_(worth_G[..., None, None]).sub_(windows * cost_G[..., None, None])
    return Marginals((value * share_G).sum(dim=-1), marginal_BTE, counted.any(dim=-1))


def selection_margin(scores: Tensor, expert_ids: Tensor) -> Tensor:
    """Return theta[t], halfway between the K-th and the (K+1)-th score of each token, no gradient: [..., B, T, 1].

    The K-th is the lowest score among the chosen experts and the (K+1)-th the highest among the others, so it also says
    where the edge is for a router whose choice is not purely by score. With K = E there is no edge: minus infinity.

    Example:
        >>> selection_margin(torch.tensor([[[3.0, 1.0, 2.0]]]), torch.tensor([[[0]]]))
        tensor([[[2.5000]]])
    """
    scores = scores.detach()
    lowest_chosen = scores.gather(-1, expert_ids).amin(dim=-1, keepdim=True)
    others = scores.scatter(-1, expert_ids, -torch.inf)
    return (lowest_chosen + others.amax(dim=-1, keepdim=True)) / 2


def margin_membership(scores: Tensor, expert_ids: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the soft membership in the top-k, ``s = sigmoid((score - theta) / temperature)``: [..., B, T, E], in fp32
    or better.

    Only experts near the edge of the top-k have a slope. Experts that the router rules out (score of minus infinity,
    e.g. outside the chosen groups) have membership 0 and no slope.

    Example:
        >>> margin_membership(torch.tensor([[[3.0, 1.0, 2.0]]]), torch.tensor([[[0]]])).round(decimals=2)
        tensor([[[0.6200, 0.1800, 0.3800]]])
    """
    scores = scores if scores.dtype == torch.float64 else scores.float()
    finite = torch.finfo(scores.dtype)  # an edge at infinity would make NaN of a score at infinity
    edge = selection_margin(scores, expert_ids).clamp_(finite.min, finite.max)
    return (scores - edge).div_(temperature).sigmoid_()
