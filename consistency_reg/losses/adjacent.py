"""Train neighbouring tokens to be routed alike (arXiv 2608.18261)."""

from torch import Tensor

from consistency_reg.functional.adjacent import adjacent_dissimilarity
from consistency_reg.losses.base import RoutingLoss, without_padding
from consistency_reg.routing import LayerRouting, RoutingTrace


class AdjacentLoss(RoutingLoss):
    """Computes ``mean_t (1 - <p_t, p_{t-1}>)`` over the adjacent tokens of a document.

    It also rewards a router that is sure of itself: two equal uniform distributions still cost ``1 - 1/E``.

    Source: arXiv 2608.18261 (Cacheable by Design?), weights 0.02 to 0.2 there, 0.05 in its main runs. The formula is
    that of the paper's public code.

    Example:
        >>> import torch
        >>> logits = torch.zeros(1, 8, 4)
        >>> trace = RoutingTrace([logits.topk(1).indices], num_experts=4, logits=[logits])
        >>> AdjacentLoss()(trace).item()
        0.75
    """

    def layer_loss(self, layer: LayerRouting, trace: RoutingTrace) -> Tensor:
        """Return the mean dissimilarity of neighbours in one layer."""
        return adjacent_dissimilarity(without_padding(layer, trace).probabilities, trace.positions)
