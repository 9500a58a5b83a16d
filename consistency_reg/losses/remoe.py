"""Train with ReMoE's loss (arXiv 2605.27081)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from consistency_reg.functional.pairs import has_predecessor, masked_mean
from consistency_reg.functional.remoe import mean_symmetric_kl, reuse_mass, window_entropy
from consistency_reg.losses.base import RoutingLoss, without_padding
from consistency_reg.losses.options import check_length, check_number
from consistency_reg.routing import LayerRouting, RoutingTrace

RHO_FLOOR = 1e-8  # the paper's guard of the logarithm


class ReMoELoss(RoutingLoss):
    """Computes ``-log(rho) + smooth * S_1 + lag * mean_d S_d + working_set * H``, which never goes below log K.

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
        self.smooth = check_number("smooth", smooth)
        self.lag = check_number("lag", lag)
        self.working_set = check_number("working_set", working_set)
        self.distances = tuple(check_length("distances", distance) for distance in distances)
        if not self.distances or len(set(self.distances)) != len(self.distances):
            raise ValueError(f"distances must be distinct positive integers, got {list(distances)}")
        self.window = check_length("window", window)

    def layer_loss(self, layer: LayerRouting, trace: RoutingTrace) -> Tensor:
        """Return the weighted sum of the terms of one layer."""
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
