"""Locality losses that others have published, under the interface and the masking of ours.

Each class names its paper and says where it had to choose: weights that multiply a whole loss, and linear warm-ups, are
left to the caller as everywhere here.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from consistency_reg.functional.published import (
    adjacent_dissimilarity,
    has_predecessor,
    masked_mean,
    mean_squared_step,
    mean_symmetric_kl,
    mean_window_drift,
    reuse_mass,
    soft_cache,
    window_entropy,
)
from consistency_reg.functional.segments import active_experts
from consistency_reg.losses.base import RoutingLoss, without_padding
from consistency_reg.routing import LayerRouting, RoutingTrace

RHO_FLOOR = 1e-8  # the paper's guard of the logarithm


class ReMoELoss(RoutingLoss):
    """``-log(rho) + smooth * S_1 + lag * mean_d S_d + working_set * H``, which never goes below log K.

    rho is the mean probability that a token gives to the K experts of its predecessor, divided by K (no gradient
    through their choice); ``S_d`` the mean symmetric KL of tokens at distance d; H the entropy of the mean distribution
    of a window, averaged over the windows. Distances that no document of the batch has are left out of the mean.

    Args:
        smooth: weight of ``S_1``.
        lag: weight of the distances' mean.
        working_set: weight of the windows' entropy.
        distances: d, in tokens.
        window: W, in tokens; a rest of a document that is shorter is left out.

    Source: arXiv 2605.27081 (ReMoE, ICML 2026). The terms, the distances and the floor 1e-8 in the logarithm are the
    paper's. Its weights and W stand in an appendix that was not at hand: the defaults here are ours, with -log(rho) in
    the lead. So is the half in ``S_d = (KL(p ‖ q) + KL(q ‖ p)) / 2``. The paper's linear warm-up is the caller's, its
    KL to the router before fine-tuning is :class:`~consistency_reg.losses.anchor.RouterAnchorLoss`.

    Example:
        >>> logits = torch.tensor([[[9.0, 0.0, 0.0]] * 32], requires_grad=True)
        >>> trace = RoutingTrace([logits.topk(1).indices], num_experts=3, logits=[logits])
        >>> round(ReMoELoss()(trace).item(), 4)  # the same expert all along, K = 1
        0.0005
    """

    def __init__(
        self,
        smooth: float = 0.1,
        lag: float = 0.1,
        working_set: float = 0.1,
        *,
        distances: Sequence[int] = (1, 2, 4, 8, 16),
        window: int = 16,
    ) -> None:
        super().__init__()
        self.smooth = _check_number("smooth", smooth)
        self.lag = _check_number("lag", lag)
        self.working_set = _check_number("working_set", working_set)
        self.distances = tuple(_check_length("distances", distance) for distance in distances)
        if not self.distances or len(set(self.distances)) != len(self.distances):
            raise ValueError(f"distances must be distinct positive integers, got {list(distances)}")
        self.window = _check_length("window", window)

    def layer_loss(self, layer: LayerRouting, trace: RoutingTrace) -> Tensor:
        """The weighted sum of the terms of one layer."""
        position = trace.positions
        log_probability = without_padding(layer, trace).log_probabilities
        probability = log_probability.exp()
        rho = reuse_mass(probability, layer.expert_ids, position)
        loss = -(rho + RHO_FLOOR).log() * has_predecessor(position, 1).any()
        divergence = {d: mean_symmetric_kl(log_probability, position, d) for d in {1, *self.distances}}
        loss = loss + self.smooth * divergence[1]
        divergence_D = torch.stack([divergence[d] for d in self.distances])
        counted_D = torch.stack([has_predecessor(position, d).any() for d in self.distances])
        loss = loss + self.lag * masked_mean(divergence_D, counted_D)
        return loss + self.working_set * window_entropy(probability, position, self.window)

    def extra_repr(self) -> str:
        """The options, for printing."""
        return (
            f"smooth={self.smooth}, lag={self.lag}, working_set={self.working_set}, "
            f"distances={self.distances}, window={self.window}"
        )


class StickyLoss(RoutingLoss):
    """``mean_t [smooth * ‖p_t - p_{t-1}‖² + anchor * ((t - s) / W) * ‖p_t - p_s‖²]``, s the start of t's window.

    Windows of W tokens follow one another from the start of a document. The mean is over the tokens with a
    predecessor; the gradient goes through both sides of a difference.

    Args:
        smooth: weight of the step between neighbours, the paper's lambda.
        anchor: weight of the drift from the window's start, the paper's alpha; 0 leaves it out.
        window: W, in tokens.

    Source: arXiv 2607.08780 (StickyMoE), as quoted in public notes on it: lambda = 0.1 with alpha from 0.05 to 1 and
    W = 4 were best there. Our defaults with a weight of 0.1 on the whole are lambda = alpha = 0.1. The paper's text was
    not at hand: one mean over t for both terms is the reading of the design page.

    Example:
        >>> logits = torch.tensor([[[50.0, 0.0], [0.0, 50.0]]])
        >>> trace = RoutingTrace([logits.topk(1).indices], num_experts=2, logits=[logits])
        >>> StickyLoss()(trace).item()  # 2 + 1/4 * 2
        2.5
    """

    def __init__(self, smooth: float = 1.0, anchor: float = 1.0, *, window: int = 4) -> None:
        super().__init__()
        self.smooth = _check_number("smooth", smooth)
        self.anchor = _check_number("anchor", anchor)
        self.window = _check_length("window", window)

    def layer_loss(self, layer: LayerRouting, trace: RoutingTrace) -> Tensor:
        """Step and drift of one layer."""
        position = trace.positions
        probability = without_padding(layer, trace).probabilities
        loss = self.smooth * mean_squared_step(probability, position)
        if self.anchor == 0:
            return loss
        return loss + self.anchor * mean_window_drift(probability, position, self.window)

    def extra_repr(self) -> str:
        """The options, for printing."""
        return f"smooth={self.smooth}, anchor={self.anchor}, window={self.window}"


class AdjacentLoss(RoutingLoss):
    """``mean_t (1 - <p_t, p_{t-1}>)`` over the adjacent tokens of a document.

    It also rewards a router that is sure of itself: two equal uniform distributions still cost ``1 - 1/E``.

    Source: arXiv 2608.18261 (Cacheable by Design?), weights 0.02 to 0.2 there, 0.05 in its main runs. The formula is
    that of the paper's public code.

    Example:
        >>> logits = torch.zeros(1, 8, 4)
        >>> trace = RoutingTrace([logits.topk(1).indices], num_experts=4, logits=[logits])
        >>> AdjacentLoss()(trace).item()
        0.75
    """

    def layer_loss(self, layer: LayerRouting, trace: RoutingTrace) -> Tensor:
        """The mean dissimilarity of neighbours in one layer."""
        return adjacent_dissimilarity(without_padding(layer, trace).probabilities, trace.positions)


class MelinoeLoss(RoutingLoss):
    """``mean_t <r_t, 1 - c_t>``: the misses per token of a soft cache that recent requests fill.

    r is the set of chosen experts, straight-through: 0/1 in value, the router's distribution p in gradient. The cache
    takes it up after the token: ``c' = (decay * Z * c + r) / Z'``, ``Z' = decay * Z + K / C``, so that c sums to C. An
    entry of c may exceed 1, so the loss lies between ``K - C`` and K.

    Args:
        decay: gamma in [0, 1]: towards 0 like LRU, 1 like LFU.
        cache_share: C as a share of the experts of the layer, in (0, 1].
        through_cache: whether the gradient goes through what a token leaves in the cache, as the formula has it, or
            through the requests only.

    Source: arXiv 2602.11192 (MELINOE): gamma 0.9 and C = E / 4, with a weight of 0.5 in its runs on instructions. The
    paper's text was not at hand; the recursion is that of the design page and of public code that cites its equations
    4 and 11, from which the first state also comes (``c = C / E`` everywhere, ``Z = 1``). Its second loss, which keeps
    the order of the base router's experts, is not part of this.

    Example:
        >>> logits = torch.tensor([[[9.0, 0.0], [9.0, 0.0]]])
        >>> trace = RoutingTrace([logits.topk(1).indices], num_experts=2, logits=[logits])
        >>> MelinoeLoss(decay=0.5, cache_share=0.5)(trace).item()  # the cache has 1/2 of it, then 5/6
        0.3333333432674408
    """

    def __init__(self, decay: float = 0.9, *, cache_share: float = 0.25, through_cache: bool = True) -> None:
        super().__init__()
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must lie in [0, 1], got {decay}")
        if not 0 < cache_share <= 1:
            raise ValueError(f"cache_share must lie in (0, 1], got {cache_share}")
        self.decay = float(decay)
        self.cache_share = float(cache_share)
        self.through_cache = through_cache

    def layer_loss(self, layer: LayerRouting, trace: RoutingTrace) -> Tensor:
        """The soft misses per token of one layer."""
        valid = trace.valid_mask
        probability = without_padding(layer, trace).probabilities
        hard = active_experts(layer.expert_ids, layer.num_experts, valid).to(probability.dtype)
        requests = hard + (probability - probability.detach()) * valid[:, :, None]
        kept = requests if self.through_cache else hard
        slots = self.cache_share * layer.num_experts
        cache = soft_cache(kept, trace.positions, slots, layer.top_k, self.decay)
        return masked_mean((requests * (1 - cache)).sum(dim=-1), valid)

    def extra_repr(self) -> str:
        """The options, for printing."""
        return f"decay={self.decay}, cache_share={self.cache_share}, through_cache={self.through_cache}"


def _check_number(name: str, value: float) -> float:
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name} must be a number of at least 0, got {value}")
    return float(value)


def _check_length(name: str, value: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be in whole tokens, at least 1, got {value!r}")
    return value
