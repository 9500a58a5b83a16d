"""Cache-aware routing in the training forwards of a model alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from consistency_reg.capture.hooks import OwnedHook
from consistency_reg.masks import named_arguments
from consistency_reg.rerouting.cache_aware_routing import CacheAwareRouting
from consistency_reg.rerouting.schedule import RoutingSchedule
from consistency_reg.session import ListenOptions


class TrainedRouting:
    """Routes the training forwards of a model with knowledge of the cache, whoever calls it.

    Args:
        model: is called in training; holds routers.
        schedule: what each optimizer step has.
        options: the routers to change, and the masks of the forward's arguments by name; what the innermost model is
            given when there are none.
    """

    def __init__(self, model: nn.Module, schedule: RoutingSchedule, options: ListenOptions) -> None:
        if not isinstance(schedule, RoutingSchedule):
            raise TypeError(
                f"routing must be a RoutingSchedule, such as RoutingSchedule(strength=0.1), got {schedule!r}"
            )
        self.schedule = schedule
        self.routing = schedule.routing(model, options.adapters, layers=options.layers)
        self._model = model
        self._masks = options.masks
        self._handle: RemovableHandle | None = None
        self._deployed = False

    def begin(self, step: int) -> None:
        """Give the routing the strength and the cache of an optimizer step."""
        self.schedule.begin(self.routing, step)

    def attach(self, step: int = 0) -> None:
        """Change the routing of training forwards from the next on."""
        self.routing.attach()
        self.begin(step)
        hook = OwnedHook(self, "_note_forward")  # before the routing's own
        self._handle = self._model.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)

    def detach(self) -> None:
        """Leave the model as it was; without effect when not attached."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        self.routing.detach()

    @contextmanager
    def deployed(self, schedule: RoutingSchedule | None = None) -> Iterator[CacheAwareRouting]:
        """Route the forwards inside as the deployed model would, whatever mode it is in; then go on as before.

        Args:
            schedule: the routing; that of the training, after its ramp, when None.
        """
        routing = self.routing
        before = routing.strength, routing.cache_ratio
        self._deployed = True
        try:
            (schedule or self.schedule.deployed()).begin(routing, 0)
            yield routing
        finally:
            self._deployed, routing.active, routing.given_masks = False, False, None
            routing.strength, routing.cache_ratio = before

    @torch.compiler.disable
    def _note_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        trains = self._deployed or (model.training and torch.is_grad_enabled())
        self.routing.active = trains and self.routing.strength > 0
        if self._masks is not None:
            self.routing.given_masks = self._masks(named_arguments(model, args, kwargs)) if trains else None
