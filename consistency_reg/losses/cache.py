"""Train for the hit rate of a cache of known size: the loss is 1 - hit rate."""

from collections.abc import Iterator
from typing import Literal

from torch import Tensor

from consistency_reg.distributed import all_sum
from consistency_reg.functional.consistency import Marginals, hit_rate_marginals, lru_residents
from consistency_reg.functional.segments import active_experts
from consistency_reg.losses.envelope import EnvelopeLoss
from consistency_reg.losses.options import check_positive
from consistency_reg.routing import LayerStack


class CacheConsistencyLoss(EnvelopeLoss):
    """Trains for an LRU cache of known size: 1 - hit rate, the sibling of :class:`LocalConsistencyLoss`.

    Resident before t are the experts that the simulated cache holds, and
    ``g[e, t] = (2*R[e, t] - hit rate) / (2*accesses)``. The value is the miss rate over all accesses of the batch, the
    first uses of a document included (nothing is resident before them).

    Args:
        cache_ratio: rho, cache slots as a multiple of K; ``C = round(rho * K)``, at most E.
        temperature: see :class:`EnvelopeLoss`, as are the options below.
    """

    def __init__(
        self,
        cache_ratio: float = 2.0,
        temperature: float = 1.0,
        balance_neutral: bool | Literal["slope"] | None = None,
        *,
        membership: Literal["margin", "probability"] = "margin",
        scope: Literal["global", "batch", "sequence"] = "global",
    ) -> None:
        super().__init__(membership=membership, temperature=temperature, balance_neutral=balance_neutral, scope=scope)
        self.cache_ratio = check_positive("cache_ratio", cache_ratio)

    def marginals(self, layers: LayerStack, position: Tensor) -> Iterator[Marginals]:
        """Yield the hit rate."""
        slots = min(max(round(self.cache_ratio * layers.top_k), 1), layers.num_experts)
        active = active_experts(layers.expert_ids, layers.num_experts, position >= 0)
        residents = lru_residents(layers.expert_ids, layers.num_experts, position, slots)
        hits, accesses = (active * residents).sum(dim=(-2, -1)), active.sum(dim=(-2, -1))  # of each row
        if self.scope != "sequence":
            hits, accesses = hits.sum(dim=-1, keepdim=True), accesses.sum(dim=-1, keepdim=True)
        if self.scope == "global":
            hits, accesses = all_sum(hits, accesses)
        yield hit_rate_marginals(residents, active, hits, accesses)
