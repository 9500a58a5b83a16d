"""Specialization of experts: how unevenly domains use one, how few token ids fill it, and whether SRP goes with it.

Source: arXiv 2505.16056. B rows, T tokens, K active of E routed experts of one layer, D domains, V token ids.
"""

import torch
from torch import Tensor

from consistency_reg.devices import is_on_host
from consistency_reg.routing import check_id_shape
from consistency_reg.routing.documents import row_chunks

CHUNK_TOKENS = 2**13  # bounds the memory whatever B is


def grouped_usage(
    expert_ids: Tensor,
    num_experts: int,
    group_ids: Tensor,
    num_groups: int,
    valid: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Count the usage of each expert by group, a group being a domain or a token id. The host waits for no device.

    Args:
        expert_ids: [B, T, K] int64.
        num_experts: E.
        group_ids: [B, T] or [B] integers in 0..G-1; those of padding do not matter.
        num_groups: G.
        valid: [B, T] bool, True for real tokens.
        out: [G, E] integers to add to; zeros when None. For a vocabulary this saves a large tensor per batch.

    Returns:
        [G, E] int64 (or ``out``); ``[g, e]`` is the number of valid tokens of group g on which e is active.

    Raises:
        TypeError: group ids that are not integers.
        ValueError: shapes that do not match; on the CPU, group ids of valid tokens outside 0..G-1.

    Example:
        >>> grouped_usage(torch.tensor([[[0, 1], [1, 2]]]), 3, torch.tensor([[1, 0]]), num_groups=2)
        tensor([[0, 1, 1],
                [1, 1, 0]])
    """
    check_id_shape(expert_ids, num_experts)
    B, T, _ = expert_ids.shape
    group_BT = check_group_ids(group_ids, num_groups, (B, T), valid)
    if out is None:
        out = torch.zeros(num_groups, num_experts, dtype=torch.int64, device=expert_ids.device)
    for rows in row_chunks(B, T, CHUNK_TOKENS):
        bin_BTK = group_BT[rows, :, None] * num_experts + expert_ids[rows]
        counts = torch.ones_like(bin_BTK, dtype=out.dtype)
        if valid is not None:
            bin_BTK, counts = bin_BTK.where(valid[rows, :, None], 0), counts * valid[rows, :, None]
        out.view(-1).scatter_add_(0, bin_BTK.flatten(), counts.flatten())
    return out


def domain_specialization(usage: Tensor, tokens: Tensor) -> Tensor:
    """Return the CV over domains of each expert's usage share: 0 for an expert that all domains use alike.

    ``q[d, e] = usage[d, e] / tokens[d]``, ``CV[e] = SD_d q[d, e] / mean_d q[d, e]`` (population SD), over the domains
    that have tokens.

    Args:
        usage: [D, E] integers, see :func:`grouped_usage`.
        tokens: [D] integers, valid tokens of each domain.

    Returns:
        [E] float64; NaN for an expert that is never used.

    Example:
        >>> domain_specialization(torch.tensor([[4, 2, 0], [0, 4, 0]]), torch.tensor([4, 8]))
        tensor([1., 0., nan], dtype=torch.float64)
    """
    seen = (tokens > 0).double()[:, None]
    share = usage / tokens.clamp_min(1).double()[:, None]
    domains = seen.sum().clamp_min(1)
    mean = share.sum(dim=0) / domains
    variance = ((share - mean).square() * seen).sum(dim=0) / domains
    return variance.sqrt() / mean


def vocabulary_specialization(usage: Tensor, favourites: int = 10) -> Tensor:
    """Return the share of each expert's activations that its favourite token ids hold: 1 for an expert of a few words.

    Args:
        usage: [V, E] integers, see :func:`grouped_usage`.
        favourites: how many token ids count as favourites.

    Returns:
        [E] float64; NaN for an expert that is never used.

    Example:
        >>> vocabulary_specialization(torch.tensor([[6, 1], [1, 1], [1, 1], [0, 1]]), favourites=1)
        tensor([0.7500, 0.2500], dtype=torch.float64)
    """
    if favourites < 1:
        raise ValueError(f"favourites must be at least 1 token id, got {favourites}")
    held = usage.topk(min(favourites, len(usage)), dim=0).values.sum(dim=0)
    return held / usage.sum(dim=0).double()


def pearson(x: Tensor, y: Tensor) -> Tensor:
    """Return the correlation of two vectors over the entries where both are numbers; NaN where one does not vary.

    Example:
        >>> round(float(pearson(torch.tensor([1.0, 2.0, 3.0, torch.nan]), torch.tensor([2.0, 4.0, 6.0, 0.0]))), 6)
        1.0
    """
    known = ~(x.isnan() | y.isnan())
    x, y = x[known].double(), y[known].double()
    if len(x) == 0 or bool((x == x[0]).all()) or bool((y == y[0]).all()):
        return torch.tensor(torch.nan, dtype=torch.float64, device=x.device)
    x, y = x - x.mean(), y - y.mean()
    return ((x @ y) / (x.norm() * y.norm())).clamp(-1, 1)


def spearman(x: Tensor, y: Tensor) -> Tensor:
    """Return the correlation of the ranks of two vectors, equal values sharing their mean rank; see :func:`pearson`.

    Example:
        >>> round(float(spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 8.0, 128.0]))), 6)
        1.0
    """
    known = ~(x.isnan() | y.isnan())
    return pearson(_ranks(x[known]), _ranks(y[known]))


def check_group_ids(group_ids: Tensor, num_groups: int, shape: tuple[int, int], valid: Tensor | None = None) -> Tensor:
    """Return group ids as [B, T] int64; raise if they are no integers of that shape, and on a CPU if out of range."""
    if group_ids.is_floating_point() or group_ids.dtype == torch.bool:
        raise TypeError(f"group ids must be an integer tensor, got {group_ids.dtype}")
    if group_ids.shape not in (shape, shape[:1]):
        raise ValueError(f"group ids must have shape [B, T] = {list(shape)} or [B], got {list(group_ids.shape)}")
    group_BT = (group_ids[:, None] if group_ids.dim() == 1 else group_ids).long().expand(shape)
    if is_on_host(group_BT):
        real = group_BT if valid is None else group_BT[valid]
        low, high = (int(real.min()), int(real.max())) if real.numel() else (0, 0)
        if low < 0 or high >= num_groups:
            raise ValueError(f"group ids must lie in 0..{num_groups - 1}, got ids from {low} to {high}")
    return group_BT


def _ranks(x: Tensor) -> Tensor:
    _, place, count = x.unique(return_inverse=True, return_counts=True)
    return (count.cumsum(0).double() - (count - 1) / 2)[place]
