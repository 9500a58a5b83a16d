"""Routing that knows the cache: choose experts that an LRU cache holds, where their scores are close to the best.

A cache of C slots a layer starts empty with each document. Before token t it holds the set M of the C experts of this
document that were used last. Each method prefers the experts in M, then the K chosen experts become the most recent of
the cache in the order of their scores z, the best last:

- "prior": the K best by ``z + strength * delta[t] * [e in M]``, where delta[t] is the mean of ``max(z) - min(z)`` over
  the document's tokens up to t.
- "max_rank": experts of M among the ``strength`` best by z come first, then the others by z.
- "cumulative": as "max_rank" with the fewest best experts whose probabilities sum to ``strength`` or more.

Always the ``guaranteed`` best experts by z are chosen. Strength 0 is the router's own choice.

Source: arXiv 2412.00099 ("Cache-Prior", "Max-Rank" and "Cumulative Sum Threshold").

B rows, T tokens, E experts, K chosen per token, C slots, ``...`` stands for layers of
one shape, which are worked on together, each by itself; or for nothing.
"""

from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from consistency_reg.devices import is_on_host
from consistency_reg.functional.cache_aware_next import next_on_host
from consistency_reg.functional.cache_aware_scan import scan
from consistency_reg.routing import check_masks
from consistency_reg.routing.documents import document_positions

METHODS = ("prior", "max_rank", "cumulative")


@dataclass(frozen=True)
class CacheAwareState:
    """Holds the caches of some rows after a token: what the next token's choice depends on.

    Attributes:
        last_use: [..., B, E] int64, higher for experts that were used later in the document, 0 for experts that it has
            not used yet. The cache of C slots holds the C highest above 0.
        score_range: [..., B] float64, the sum of ``max(z) - min(z)`` over the document's tokens.
        tokens: [..., B] int64, tokens of the document so far; 0 where the next token starts a document.
        document_ids: [..., B] int64, the document that the row is in.
    """

    last_use: Tensor
    score_range: Tensor
    tokens: Tensor
    document_ids: Tensor

    @classmethod
    def empty(cls, *rows: int, num_experts: int, device: torch.device | str | None = None) -> Self:
        """Return the state before the first token.

        Args:
            rows: B, or the layers and B.
            num_experts: E.
            device: where the tensors live.

        Example:
            >>> CacheAwareState.empty(2, num_experts=3).last_use.tolist()
            [[0, 0, 0], [0, 0, 0]]
        """
        tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        last_use = torch.zeros(*rows, num_experts, dtype=torch.int64, device=device)
        return cls(last_use, tokens.double(), tokens, tokens.clone())

    def select(self, rows: Tensor) -> Self:
        """Return the state of some rows [B'] int64, in that order: beams that were kept, or rows that continue.

        Example:
            >>> CacheAwareState.empty(2, num_experts=3).select(torch.tensor([1, 1, 0])).tokens.tolist()
            [0, 0, 0]
        """
        dim = self.tokens.dim() - 1
        return type(self)(*(getattr(self, field.name).index_select(dim, rows) for field in fields(self)))

    def residents(self, slots: int) -> Tensor:
        """Return which experts a cache of ``slots`` slots holds for the next token of the same document: [..., B, E].

        Example:
            >>> CacheAwareState.empty(1, num_experts=2).residents(slots=1)
            tensor([[False, False]])
        """
        lowest = self.last_use.topk(min(slots, self.last_use.shape[-1]), dim=-1).values[..., -1:]
        return self.last_use >= lowest.clamp_min(1)


@dataclass(frozen=True)
class CacheAwareChoice:
    """Holds the experts that were chosen for some tokens, and the caches around them.

    Attributes:
        expert_ids: [..., B, T, K] int64, in the order of the scores, the best first.
        residents: [..., B, T, E] bool, the experts that the cache held before each token; arbitrary on padding.
        state: of the caches after the last token.
    """

    expert_ids: Tensor
    residents: Tensor
    state: CacheAwareState

    @property
    def hits(self) -> Tensor:
        """[..., B, T, K] bool, whether the cache held each chosen expert; arbitrary on padding."""
        return self.residents.gather(-1, self.expert_ids)


def cache_aware_ids(
    scores: Tensor,
    top_k: int,
    slots: int,
    strength: float,
    guaranteed: int = 1,
    valid: Tensor | None = None,
    document_ids: Tensor | None = None,
    method: str = "prior",
) -> Tensor:
    """Return the experts that a router chooses which prefers those in an LRU cache, see the module.

    Args:
        scores: [..., B, T, E] floating point, what the router selects by.
        top_k: K.
        slots: C, the experts that the cache of each layer holds; at least K.
        strength: of "prior": the bonus of a cached expert, in mean ranges of the scores (0.1 is a usual value); of
            "max_rank": up to which rank cached experts are preferred, a whole number; of "cumulative": a probability.
            0 leaves the router's choice as it is.
        guaranteed: so many best experts are chosen always; 0 to K.
        valid: [B, T] bool, True for real tokens; all when None.
        document_ids: [B, T] integers; one document a row when None.
        method: "prior", "max_rank" or "cumulative".

    Returns:
        [..., B, T, K] int64, in the order of the scores, the best first. On padding the router's own choice.

    Raises:
        TypeError: scores that are not floating point, masks of a wrong dtype.
        ValueError: a strength that is negative, not a number, or not one that the method takes; fewer slots than K;
            ``guaranteed`` outside 0..K; K outside 1..E; shapes that do not match; an unknown method.

    Example:
        >>> scores = torch.tensor([[[3.0, 2.0, 0.0], [1.9, 0.0, 2.0]]])
        >>> cache_aware_ids(scores, top_k=1, slots=1, strength=0.0).tolist()
        [[[0], [2]]]
        >>> cache_aware_ids(scores, top_k=1, slots=1, strength=0.1, guaranteed=0).tolist()
        [[[0], [0]]]
    """
    return cache_aware_choice(scores, top_k, slots, strength, guaranteed, valid, document_ids, method).expert_ids


@torch.no_grad()
def cache_aware_choice(
    scores: Tensor,
    top_k: int,
    slots: int,
    strength: float,
    guaranteed: int = 1,
    valid: Tensor | None = None,
    document_ids: Tensor | None = None,
    method: str = "prior",
    *,
    probabilities: Tensor | None = None,
    own_ids: Tensor | None = None,
    state: CacheAwareState | None = None,
) -> CacheAwareChoice:
    """Return the choice of :func:`cache_aware_ids` with the caches, going on from the caches of earlier tokens.

    A row that is cut into several calls, down to one token each, gives the same as in one call.

    Args:
        scores, top_k, slots, strength, guaranteed, valid, document_ids, method: see :func:`cache_aware_ids`.
        probabilities: [..., B, T, E], whose sum "cumulative" compares; the softmax of the scores when None.
        own_ids: [..., B, T, K] int64, the router's own choice where it is not the K highest scores; it is taken on
            padding and at strength 0.
        state: the caches before the first token; empty when None. A row goes on with its document if that did not end
            in padding and ``document_ids`` says the same (without ``document_ids`` it always does).

    Raises:
        TypeError, ValueError: see :func:`cache_aware_ids`; also a state of other rows than the scores.

    Example:
        >>> scores = torch.tensor([[[3.0, 2.0, 0.0], [1.9, 0.0, 2.0]]])
        >>> first = cache_aware_choice(scores[:, :1], 1, 1, 0.1, 0)
        >>> second = cache_aware_choice(scores[:, 1:], 1, 1, 0.1, 0, state=first.state)
        >>> second.expert_ids.tolist(), second.hits.tolist()
        ([[[0]]], [[[True]]])
    """
    check_cache_aware(scores.shape[-1], top_k, slots, strength, guaranteed, method)
    _check_scores(scores, valid, document_ids)
    *layers, B, T, E = scores.shape
    if own_ids is None:
        own_ids = scores.topk(top_k, dim=-1).indices
    if state is None:
        state = CacheAwareState.empty(*layers, B, num_experts=E, device=scores.device)
    elif state.last_use.shape != (*layers, B, E):
        raise ValueError(f"state must be of rows {[*layers, B]} and {E} experts, got {list(state.last_use.shape)}")
    if scores.numel() == 0:
        return CacheAwareChoice(own_ids, scores.new_zeros(scores.shape, dtype=torch.bool), state)

    z = scores.detach().to(torch.promote_types(scores.dtype, torch.float32))
    if method == "prior" and strength > 0 and T == 1 and document_ids is None and _is_all_real(valid):
        return _choose_next(z, top_k, slots, strength, guaranteed, state)
    if valid is not None:
        z = z.masked_fill(~valid[:, :, None], 0)
    clocks = _Clocks.of(state, T, valid, document_ids)
    order = z.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(E, device=z.device).expand_as(order))
    key = (clocks.clock[..., None] + 1) * E - rank  # the later, then the better: the higher
    range_so_far = _range_so_far(z, clocks, state)
    caches = key, clocks.start * E, state.last_use, top_k, slots
    if strength == 0:
        chosen, residents, last_use = scan(z, z, *caches, own_ids)
    else:
        delta = range_so_far / (clocks.position + 1).clamp_min(1)
        preferences = _preferences(z, order, rank, delta, strength, method, probabilities)
        base, preferred = (values.masked_fill(rank < guaranteed, torch.inf) for values in preferences)
        chosen, residents, last_use = scan(base, preferred, *caches)
        chosen = order.gather(-1, rank.gather(-1, chosen).sort(dim=-1).values)
        if valid is not None:
            chosen = chosen.where(valid[:, :, None], own_ids)
    tokens = clocks.position[..., -1] + 1  # 0 after padding
    last = state.document_ids if document_ids is None else document_ids[:, -1].expand_as(state.document_ids)
    after = CacheAwareState(
        last_use=(last_use - clocks.start[..., -1:] * E).clamp_min(0).masked_fill((tokens == 0)[..., None], 0),
        score_range=range_so_far[..., -1] * (tokens > 0),
        tokens=tokens,
        document_ids=last.long(),
    )
    return CacheAwareChoice(chosen, residents, after)


def _choose_next(
    z: Tensor, top_k: int, slots: int, strength: float, guaranteed: int, state: CacheAwareState
) -> CacheAwareChoice:
    """Return the choice of "prior" for one token that goes on with each row's document: what decoding waits for."""
    if is_on_host(z):
        return _choose_next_on_host(z, top_k, slots, strength, guaranteed, state)
    E, tokens = z.shape[-1], state.tokens + 1
    residents = state.residents(slots)[..., None, :]
    score_range = state.score_range + _score_range(z)[..., 0]
    bonus = (strength * (score_range / tokens)).to(z.dtype)[..., None, None]
    order = z.argsort(dim=-1, descending=True, stable=True)
    value = torch.where(residents, z + bonus, z).scatter_(-1, order[..., :guaranteed], torch.inf)
    rank = order.argsort(dim=-1).gather(-1, value.topk(top_k, dim=-1, sorted=False).indices).sort(dim=-1).values
    chosen = order.gather(-1, rank)
    key = (tokens * E)[..., None] - rank[..., 0, :]
    last_use = state.last_use.scatter(-1, chosen[..., 0, :], key)
    return CacheAwareChoice(chosen, residents, CacheAwareState(last_use, score_range, tokens, state.document_ids))


def _choose_next_on_host(
    z: Tensor, top_k: int, slots: int, strength: float, guaranteed: int, state: CacheAwareState
) -> CacheAwareChoice:
    """Return the same as :func:`_choose_next` from tensors on a CPU."""
    *rows, _, E = z.shape
    before = state.last_use.view(-1, E), state.score_range.view(-1), state.tokens.view(-1)
    chosen, residents, *after = next_on_host(
        z.view(-1, E), *before, top_k=top_k, slots=slots, strength=strength, guaranteed=guaranteed
    )
    last_use, score_range, tokens = after[0].view(*rows, E), after[1].view(rows), after[2].view(rows)
    return CacheAwareChoice(
        chosen.view(*rows, 1, -1),
        residents.view(*rows, 1, E),
        CacheAwareState(last_use, score_range, tokens, state.document_ids),
    )


def check_cache_aware(
    num_experts: int, top_k: int, slots: int, strength: float, guaranteed: int, method: str = "prior"
) -> None:
    """Raise ValueError unless these are settings of :func:`cache_aware_ids` for a layer of E experts.

    Example:
        >>> check_cache_aware(num_experts=8, top_k=2, slots=4, strength=0.1, guaranteed=1)
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k must lie in 1..{num_experts}, the experts of the layer, got {top_k}")
    if slots < top_k:
        raise ValueError(f"slots must be at least top_k={top_k}, the experts that a token uses, got {slots}")
    if not 0 <= guaranteed <= top_k:
        raise ValueError(f"guaranteed must lie in 0..top_k={top_k}, got {guaranteed}")
    if not 0 <= strength < float("inf"):
        raise ValueError(f"strength must be a number of at least 0, got {strength}")
    if method == "max_rank" and strength != int(strength):
        raise ValueError(f"strength of method 'max_rank' must be a rank, a whole number, got {strength}")
    if method == "cumulative" and strength > 1:
        raise ValueError(f"strength of method 'cumulative' must be a probability, at most 1, got {strength}")


def _check_scores(scores: Tensor, valid: Tensor | None, document_ids: Tensor | None) -> None:
    if not scores.is_floating_point():
        raise TypeError(f"scores must be floating point, got {scores.dtype}")
    if scores.dim() < 3:
        raise ValueError(f"scores must have shape [..., B, T, E], got {list(scores.shape)}")
    B, T = scores.shape[-3:-1]
    check_masks((B, T), valid, document_ids)


def _is_all_real(valid: Tensor | None) -> bool:
    """Return whether there is surely no padding; a GPU is not asked, as the host would wait for its answer."""
    return valid is None or (is_on_host(valid) and bool(valid.all()))


@dataclass(frozen=True)
class _Clocks:
    """Holds the clocks and positions of tokens: all [..., B, T] int64.

    Attributes:
        clock: counts the tokens of a row, those of a document that it goes on with included.
        position: of each token in its document, -1 on padding.
        start: the clock of the first token of each token's document; of a pad its own.
    """

    clock: Tensor
    position: Tensor
    start: Tensor

    @classmethod
    def of(cls, state: CacheAwareState, T: int, valid: Tensor | None, document_ids: Tensor | None) -> "_Clocks":
        """Return the clocks of the T tokens that follow ``state``."""
        before = state.tokens[..., None]
        B, device = before.shape[-2], before.device
        position_BT = document_positions((B, T), valid, document_ids, device=device)
        clock = before + torch.arange(T, device=device)
        first_document = torch.arange(T, device=device) == position_BT
        if document_ids is not None:
            first_document = first_document & (document_ids[:, :1] == state.document_ids[..., None])
        position = torch.where(first_document, position_BT + before, position_BT)
        return cls(clock, position, clock - position.clamp_min(0))


def _range_so_far(z: Tensor, clocks: _Clocks, state: CacheAwareState) -> Tensor:
    """Return the sum of ``max(z) - min(z)`` over each token's document up to it: [..., B, T] float64."""
    ranges = _score_range(z)
    running = ranges.cumsum(dim=-1)
    T = z.shape[-2]
    index_T = torch.arange(T, device=z.device)
    first = (index_T - clocks.position.clamp_min(0)).clamp_min(0)
    before = running.gather(-1, first) - ranges.gather(-1, first)
    carried = torch.where(clocks.position > index_T, state.score_range[..., None], 0)
    return running - before + carried


def _score_range(z: Tensor) -> Tensor:
    """Return ``max(z) - min(z)`` of each token, [..., B, T] float64.

    Scores of minus infinity, with which routers rule experts out, are not counted.
    """
    lowest = torch.where(z == -torch.inf, torch.inf, z).amin(dim=-1)
    return (z.amax(dim=-1) - lowest).clamp_min(0).double()


def _preferences(
    z: Tensor, order: Tensor, rank: Tensor, delta: Tensor, strength: float, method: str, probabilities: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return what experts are chosen by, outside the cache and inside it: [..., B, T, E] each."""
    if method == "prior":
        return z, z + (strength * delta)[..., None].to(z.dtype)
    if method == "max_rank":
        is_promoted = rank < int(strength)
    else:
        p = z.softmax(dim=-1) if probabilities is None else probabilities.to(z.dtype)
        ordered = p.gather(-1, order).double()
        before = (ordered.cumsum(dim=-1) - ordered).gather(-1, rank)
        is_promoted = before < strength
    E = z.shape[-1]
    base = -rank.to(z.dtype)
    return base, base + E * (is_promoted & z.isfinite())  # what the router ruled out stays out
