"""Add up the routing of a model as it is deployed, with cache-aware routing."""

from collections.abc import Sequence

import torch
from torch import Tensor

from consistency_reg.distributed import all_sum
from consistency_reg.functional.agreement import agreement_mean
from consistency_reg.measures import AGREEMENT, CACHE_RATIO, STRENGTH
from consistency_reg.routing import RoutingTrace
from consistency_reg.tracking.accumulate import RoutingMeasures


class DeployedMeasures:
    """Adds up the measures of a deployed model, and how many of the chosen experts its routers prefer by themselves.

    Args:
        measures: those to add up.
    """

    def __init__(self, measures: RoutingMeasures) -> None:
        self._measures = measures
        self._agreed_2: Tensor | int = 0  # choices that the router prefers, and all choices

    def add(self, trace: RoutingTrace, domain: int) -> None:
        """Count a batch of a domain."""
        self._measures.add(trace, domain)
        self._agreed_2 = self._agreed_2 + agreed_choices(trace)

    def forget(self) -> None:
        """Forget all that was added."""
        self._measures.forget()
        self._agreed_2 = 0

    def results(
        self, names: Sequence[str], device: torch.device, strength: float, cache_ratio: float
    ) -> dict[str, Tensor | float]:
        """Return the measures of the model by name, over all processes, and forget them; empty where nothing was added.

        Args:
            names: of the domains, by number.
            device: of this process.
            strength: of the routing that the model was run with.
            cache_ratio: of that routing.
        """
        measured, agreed_2 = self._measures.results(names, device), self._agreed_2
        self.forget()
        if measured is None:
            return {}
        if not isinstance(agreed_2, Tensor):  # other processes alone have counted
            agreed_2 = torch.zeros(2, dtype=torch.int64, device=device)
        ((agreed, choices),) = all_sum(agreed_2)
        return {
            **measured.model,
            AGREEMENT.key: agreed.double() / choices.clamp_min(1),
            STRENGTH.key: strength,
            CACHE_RATIO.key: cache_ratio,
        }


def agreed_choices(trace: RoutingTrace) -> Tensor:
    """Return how many of the chosen experts are among the K that the router itself prefers, and how many there are."""
    means = [
        agreement_mean(layer.expert_ids, layer.scores.topk(layer.top_k).indices, trace.valid)
        for layer in trace
        if layer.scores is not None
    ]
    return torch.stack([torch.stack([mean.total, mean.count]) for mean in means]).sum(dim=0)
