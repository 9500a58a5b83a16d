"""Keep router logits small with the z-loss."""

import torch
from torch import Tensor

from consistency_reg.functional.pairs import masked_mean
from consistency_reg.losses.base import RoutingLoss, without_padding
from consistency_reg.routing import LayerRouting, RoutingTrace


class RouterZLoss(RoutingLoss):
    """Computes ``mean over valid tokens of logsumexp(logits)^2``, which keeps the router's logits small.

    Source: arXiv 2202.08906.

    Example:
        >>> logits = torch.zeros(1, 2, 4)
        >>> trace = RoutingTrace([logits.topk(1).indices], num_experts=4, logits=[logits])
        >>> round(RouterZLoss()(trace).item(), 3)  # log(4)^2
        1.922
    """

    def layer_loss(self, layer: LayerRouting, trace: RoutingTrace) -> Tensor:
        """Return the z-loss of one layer."""
        logits_BTE = without_padding(layer, trace).logits
        if logits_BTE is None:
            raise ValueError(f"layer {layer.name!r}: the loss needs the router's logits, but the trace has none")
        dtype = torch.promote_types(logits_BTE.dtype, torch.float32)
        return masked_mean(logits_BTE.to(dtype).logsumexp(dim=-1) ** 2, trace.valid_mask)
