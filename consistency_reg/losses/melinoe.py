"""Train with Melinoe's loss (arXiv 2602.11192)."""

from torch import Tensor

from consistency_reg.functional.melinoe import soft_cache
from consistency_reg.functional.pairs import masked_mean
from consistency_reg.functional.segments import active_experts
from consistency_reg.losses.base import RoutingLoss, without_padding
from consistency_reg.routing import LayerRouting, RoutingTrace


class MelinoeLoss(RoutingLoss):
    """Computes ``mean_t <r_t, 1 - c_t>``: the misses per token of a soft cache that recent requests fill.

    r is the set of chosen experts, straight-through: 0/1 in value, the router's distribution p in gradient. The cache
    takes it up after the token: ``c' = (decay * Z * c + r) / Z'``, ``Z' = decay * Z + K / C``, so that c sums to C. An
    entry of c may exceed 1, so the loss lies between ``K - C`` and K.

    Args:
        decay: gamma in [0, 1]: towards 0 like LRU, 1 like LFU.
        cache_share: C as a share of the experts of the layer, in (0, 1].
        through_cache: whether the gradient goes through what a token leaves in the cache, as the formula has it, or
            through the requests only.

    Source: arXiv 2602.11192 (MELINOE): gamma 0.9 and C = E / 4, with a weight of 0.5 in its runs on instructions. The
    paper's text was not at hand; the recursion is that of public code that cites its equations 4 and 11, from which the
    first state also comes (``c = C / E`` everywhere, ``Z = 1``). Its second loss, which keeps
    the order of the base router's experts, is not part of this.

    Example:
        >>> import torch
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
        """Return the soft misses per token of one layer."""
        valid = trace.valid_mask
        probability = without_padding(layer, trace).probabilities
        hard = active_experts(layer.expert_ids, layer.num_experts, valid).to(probability.dtype)
        requests = hard + (probability - probability.detach()) * valid[:, :, None]
        kept = requests if self.through_cache else hard
        slots = self.cache_share * layer.num_experts
        cache = soft_cache(kept, trace.positions, slots, layer.top_k, self.decay)
        return masked_mean((requests * (1 - cache)).sum(dim=-1), valid)
