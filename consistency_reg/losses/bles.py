"""Train with the block-wise expert selection loss of CoSMoEs."""

from torch import Tensor

from consistency_reg.functional.bles import mean_absolute_step, replaced_experts
from consistency_reg.losses.base import RoutingLoss, without_padding
from consistency_reg.losses.options import check_positive
from consistency_reg.routing import LayerRouting, RoutingTrace


class BlockwiseLoss(RoutingLoss):
    """Computes ``floor(H/2) / (B K (T-1)) * sum_t ‖p_t - p_{t-1}‖₁ / (B T)``: share of experts replaced times step.

    ``H = sum |1[e in S_t] - 1[e in S_{t-1}]|`` has no gradient: the more experts a batch replaces from token to token,
    the more each step of the router's distribution costs. Pairs are the adjacent tokens of a document: B (T-1) is
    their number and B T that of the valid tokens.

    Args:
        temperature: of the distribution, ``softmax(scores / temperature)``.

    Source: arXiv 2503.00245 (CoSMoEs, BlES). The temperature of the paper is not published: the default of 1 is ours.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[[90.0, 0.0], [0.0, 90.0]]])
        >>> trace = RoutingTrace([logits.topk(1).indices], num_experts=2, logits=[logits])
        >>> BlockwiseLoss()(trace).item()  # 1 of 1 experts is replaced, the step is 2, there are 2 tokens
        1.0
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = check_positive("temperature", temperature)

    def layer_loss(self, layer: LayerRouting, trace: RoutingTrace) -> Tensor:
        """Return the loss of one layer."""
        position = trace.positions
        log_probability = without_padding(layer, trace).log_probabilities
        probability = (log_probability / self.temperature).softmax(dim=-1)
        replaced, accesses = replaced_experts(layer.expert_ids, layer.num_experts, position)
        return mean_absolute_step(probability, position) * replaced / accesses.clamp_min(1)
