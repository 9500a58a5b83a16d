"""Train with StickyMoE's loss (arXiv 2607.08780)."""

from torch import Tensor

from consistency_reg.functional.sticky import mean_squared_step, mean_window_drift
from consistency_reg.losses.base import RoutingLoss, without_padding
from consistency_reg.losses.options import check_length, check_number
from consistency_reg.routing import LayerRouting, RoutingTrace


class StickyLoss(RoutingLoss):
    """Computes ``mean_t [smooth * ‖p_t - p_{t-1}‖² + anchor * ((t - s) / W) * ‖p_t - p_s‖²]``, s the start of a window.

    Windows of W tokens follow one another from the start of a document. The mean is over the tokens with a
    predecessor; the gradient goes through both sides of a difference.

    Args:
        smooth: weight of the step between neighbours, the paper's lambda.
        anchor: weight of the drift from the window's start, the paper's alpha; 0 leaves it out.
        window: W, in tokens.

    Source: arXiv 2607.08780 (StickyMoE), as quoted in public notes on it: lambda = 0.1 with alpha from 0.05 to 1 and
    W = 4 were best there. Our defaults with a weight of 0.1 on the whole are lambda = alpha = 0.1. The paper's text was
    not at hand: that both terms have one mean over t is our reading.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[[50.0, 0.0], [0.0, 50.0]]])
        >>> trace = RoutingTrace([logits.topk(1).indices], num_experts=2, logits=[logits])
        >>> StickyLoss()(trace).item()  # 2 + 1/4 * 2
        2.5
    """

    def __init__(self, smooth: float = 1.0, anchor: float = 1.0, *, window: int = 4) -> None:
        super().__init__()
        self.smooth = check_number("smooth", smooth)
        self.anchor = check_number("anchor", anchor)
        self.window = check_length("window", window)

    def layer_loss(self, layer: LayerRouting, trace: RoutingTrace) -> Tensor:
        """Return the step and drift of one layer."""
        position = trace.positions
        probability = without_padding(layer, trace).probabilities
        loss = self.smooth * mean_squared_step(probability, position)
        if self.anchor == 0:
            return loss
        return loss + self.anchor * mean_window_drift(probability, position, self.window)
