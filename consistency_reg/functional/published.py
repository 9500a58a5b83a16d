"""The equations of the published locality losses, as pure functions of the router's distribution.

Every mean divides by what was counted and is 0, with a graph, where there was nothing to count. A pair at distance d is
a token with the one d before it in the same document; windows of W tokens follow one another from a document's start.

B rows, T tokens, E routed experts of the layer, K active per token, p the router's distribution, W window length.
"""

import torch
from torch import Tensor

CHUNK = 64  # tokens that one matrix product of discounted_sums covers


def masked_mean(values: Tensor, counted: Tensor) -> Tensor:
    """Mean of ``values`` where ``counted``, 0 where nothing is; what is not counted must be finite."""
    return (values * counted).sum() / counted.sum().clamp_min(1)


def has_predecessor(position: Tensor, distance: int) -> Tensor:
    """Whether the token ``distance`` before is of the same document: [B, T] positions -> [B, T - distance] bool.

    Example:
        >>> has_predecessor(torch.tensor([[0, 1, 2, 0, 1, -1]]), 1)
        tensor([[ True,  True, False,  True, False]])
    """
    return position[:, distance:] >= distance


def symmetric_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``(KL(p ‖ q) + KL(q ‖ p)) / 2`` over the last axis of two log-distributions.

    Example:
        >>> p = torch.tensor([0.8, 0.2]).log()
        >>> round(symmetric_kl(p, p.flip(0)).item(), 4)  # 0.6 * ln 4
        0.8318
    """
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(dim=-1) / 2


def mean_symmetric_kl(log_probability: Tensor, position: Tensor, distance: int) -> Tensor:
    """Mean :func:`symmetric_kl` of the pairs at ``distance``: [B, T, E] log p -> scalar."""
    later, earlier = log_probability[:, distance:], log_probability[:, :-distance]
    return masked_mean(symmetric_kl(later, earlier), has_predecessor(position, distance))


def reuse_mass(probability: Tensor, expert_ids: Tensor, position: Tensor) -> Tensor:
    """``rho = mean_t 1/K * sum(p_t[e] for e of the set that t - 1 used)``; at most 1/K, no gradient to t - 1.

    Args:
        probability: [B, T, E].
        expert_ids: [B, T, K], anything on padding.
        position: [B, T] index of each token in its document, -1 on padding.

    Example:
        >>> probability = torch.tensor([[[0.5, 0.5], [0.9, 0.1]]])
        >>> reuse_mass(probability, torch.tensor([[[0], [0]]]), torch.tensor([[0, 1]]))
        tensor(0.9000)
    """
    counted = has_predecessor(position, 1)
    used_before = expert_ids[:, :-1].where(counted[:, :, None], 0)
    return masked_mean(probability[:, 1:].gather(-1, used_before).mean(dim=-1), counted)


def window_entropy(probability: Tensor, position: Tensor, window: int) -> Tensor:
    """Entropy in nats of the mean distribution of a window, averaged over the whole windows: [B, T, E] -> scalar.

    Windows follow one another without overlap from the document's start; a rest shorter than W is left out.

    Example:
        >>> probability = torch.eye(2)[None, [0, 1, 1, 1]]
        >>> round(window_entropy(probability, torch.tensor([[0, 1, 2, 3]]), 2).item(), 4)  # (ln 2 + 0) / 2
        0.3466
    """
    B, T, E = probability.shape
    slots = T // window  # a row holds at most so many whole windows; one slot more takes the tokens outside of them
    end_BT = torch.arange(T, device=position.device) - position % window + window - 1
    last_position_BT = position.gather(1, end_BT.clamp(max=T - 1))
    whole_BT = (position >= 0) & (end_BT < T) & (last_position_BT - position == window - 1 - position % window)
    ends_BT = whole_BT & (position % window == window - 1)
    earlier_BT = ends_BT.cumsum(dim=1) - ends_BT.long()
    slot_BT = earlier_BT.where(whole_BT, slots)
    sums = probability.new_zeros(B, slots + 1, E).scatter_add(1, slot_BT[:, :, None].expand(B, T, E), probability)
    counted = torch.arange(slots, device=position.device) < ends_BT.sum(dim=1, keepdim=True)
    mean = sums[:, :-1] / window
    entropy = -(mean * mean.clamp_min(torch.finfo(mean.dtype).tiny).log()).sum(dim=-1)
    return masked_mean(entropy, counted)


def adjacent_dissimilarity(probability: Tensor, position: Tensor) -> Tensor:
    """``mean(1 - <p_t, p_{t-1}>)``: [B, T, E] -> scalar.

    Example:
        >>> adjacent_dissimilarity(torch.eye(2)[None, [0, 0, 1]], torch.tensor([[0, 1, 2]]))
        tensor(0.5000)
    """
    likeness = (probability[:, 1:] * probability[:, :-1]).sum(dim=-1)
    return masked_mean(1 - likeness, has_predecessor(position, 1))


def mean_squared_step(probability: Tensor, position: Tensor) -> Tensor:
    """``mean ‖p_t - p_{t-1}‖²`` over the adjacent pairs: [B, T, E] -> scalar.

    Example:
        >>> mean_squared_step(torch.eye(2)[None, [0, 0, 1]], torch.tensor([[0, 1, 2]]))
        tensor(1.)
    """
    step = probability[:, 1:] - probability[:, :-1]
    return masked_mean(step.square().sum(dim=-1), has_predecessor(position, 1))


def mean_window_drift(probability: Tensor, position: Tensor, window: int) -> Tensor:
    """``mean ((t - s) / W) ‖p_t - p_s‖²``, s the start of t's window, over the tokens that have a predecessor.

    Example:
        >>> mean_window_drift(torch.eye(2)[None, [0, 1, 1]], torch.tensor([[0, 1, 2]]), 2)  # (1/2 * 2 + 0) / 2
        tensor(0.5000)
    """
    T = position.shape[1]
    since_start = position % window
    start = (torch.arange(T, device=position.device) - since_start).clamp_min(0)
    drift = (probability - probability.gather(1, start[:, :, None].expand_as(probability))).square().sum(dim=-1)
    return masked_mean(since_start.to(drift.dtype) / window * drift, position >= 1)


def discounted_sums(values: Tensor, position: Tensor, decay: float) -> Tensor:
    """``out[t] = sum of decay^(t-1-u) * values[u]`` over the tokens u before t of t's document: [B, T, E] -> same.

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
    """What a cache of ``slots`` would hold before each token, its recent requests counting most: [B, T, E].

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


def mean_kl(log_probability: Tensor, log_reference: Tensor, valid: Tensor) -> Tensor:
    """``mean KL(p_t ‖ reference_t)`` over the valid tokens: two [B, T, E] log-distributions -> scalar.

    Example:
        >>> log_p = torch.tensor([[[0.5, 0.5]]]).log()
        >>> round(mean_kl(log_p, torch.tensor([[[0.8, 0.2]]]).log(), torch.tensor([[True]])).item(), 4)
        0.2231
    """
    divergence = (log_probability.exp() * (log_probability - log_reference)).sum(dim=-1)
    return masked_mean(divergence, valid)
