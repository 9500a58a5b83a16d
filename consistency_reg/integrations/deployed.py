"""Evaluate a model a second time as it is deployed, with cache-aware routing."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from consistency_reg.distributed import all_sum
from consistency_reg.integrations.attach import attachments
from consistency_reg.integrations.outputs import loss_of
from consistency_reg.rerouting import CacheAwareRouting, RoutingSchedule
from consistency_reg.routing import RoutingTrace
from consistency_reg.session import ListenOptions
from consistency_reg.tracking.accumulate import RoutingMeasures
from consistency_reg.tracking.deployed import DeployedMeasures


class DeployedEvaluation:
    """Runs the batches of an evaluation once more with the routing of deployment, and adds up what that gives.

    Whoever listens to the model gives the routing of these forwards to :meth:`hear` while :attr:`running`.

    The routing is ``schedule``, after its ramp and with the mean of its cache ratios; when None that which a term
    attached to the model trains with, if any does.

    Args:
        model: is evaluated.
        schedule: the routing, or None.
        measures: those to add up.
        options: the routers and masks of the schedule's routing.

    Attributes:
        running: whether the present forward is one of a deployed model.

    Raises:
        ValueError: with a schedule, a model whose routers cannot be made to know a cache.
    """

    def __init__(
        self, model: nn.Module, schedule: RoutingSchedule | None, measures: RoutingMeasures, options: ListenOptions
    ) -> None:
        self._model = model
        self._schedule = None if schedule is None else schedule.deployed()
        self._own = None
        if self._schedule is not None and self._schedule.strength:
            self._own = self._schedule.routing(model, options.adapters, options.masks, options.layers)
        self._measures = DeployedMeasures(measures)
        self.running = False
        self._heard: RoutingTrace | None = None
        self._used_settings = (0.0, 1.0)  # strength and cache ratio
        self._losses: dict[int, Tensor] = {}  # by dataset: the sum over rows, and the rows

    def forget(self) -> None:
        """Forget what was counted."""
        self._measures.forget()
        self._losses = {}

    def routed(self) -> AbstractContextManager[CacheAwareRouting] | None:
        """Return the context in which a forward is that of the deployed model; None where there is no routing."""
        trained = next((one.trained_routing for one in attachments(self._model) if one.trained_routing), None)
        if trained is not None and (self._schedule is None or self._schedule.strength):
            return trained.deployed(self._schedule)
        return self._own

    def hear(self, trace: RoutingTrace) -> None:
        """Take the routing of the present forward."""
        self._heard = trace

    @torch.no_grad()
    def evaluate(self, given: Mapping[str, Any], dataset: int) -> None:
        """Run a batch of a dataset once more, and count it; without effect where there is no routing.

        Args:
            given: the arguments of the forward by name.
            dataset: its number.
        """
        context = self.routed()
        if context is None or given.get("past_key_values") is not None:  # which the first forward has filled
            return
        self.running, self._heard = True, None
        try:
            with context as routing:
                routing.reset()
                self._used_settings = routing.strength, routing.cache_ratio
                output = self._model(**given)
        finally:
            self.running = False
        rows = next((len(value) for value in given.values() if isinstance(value, Tensor) and value.dim()), 1)
        if self._heard is not None:
            self._add(self._heard, output, rows, dataset)

    def _add(self, trace: RoutingTrace, output: Any, rows: int, dataset: int) -> None:
        """Count the routing of a batch, and the model's own loss, weighted by rows as the Trainer's."""
        self._measures.add(trace, dataset)
        if (loss := loss_of(output)) is not None:
            sums = torch.stack([loss.detach().float() * rows, loss.new_tensor(rows).float()])
            self._losses[dataset] = self._losses.get(dataset, torch.zeros_like(sums)) + sums

    def results(self, names: Sequence[str], device: torch.device) -> dict[str, float]:
        """Return the measures by name, over all processes, and begin anew; empty where nothing was counted.

        Args:
            names: of the datasets, by number.
            device: of this process.
        """
        values = self._measures.results(names, device, *self._used_settings)
        losses, self._losses = self._losses, {}
        if values and losses:
            (sums,) = all_sum(torch.stack([losses[dataset] for dataset in sorted(losses)]))
            values["loss"] = sums[:, 0].sum() / sums[:, 1].sum().clamp_min(1)
            if len(losses) > 1:
                values |= {
                    f"loss/{names[n]}": of[0] / of[1].clamp_min(1) for n, of in zip(sorted(losses), sums, strict=True)
                }
        return {name: float(value) for name, value in values.items()}
