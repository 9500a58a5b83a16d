"""Hear each forward of a model, with its arguments by name, for whoever has no trainer's batches."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from consistency_reg.capture.hooks import OwnedHook
from consistency_reg.masks import named_arguments
from consistency_reg.routing import RoutingTrace
from consistency_reg.session import ListenOptions, RoutingSession

Given = Mapping[str, Any]


class ForwardListener:
    """Calls ``hear(given)`` at the end of each forward of a model in which routers ran; in it :meth:`trace` works.

    Args:
        model: holds routers.
        hear: is given the arguments of the forward by name.
        options: which routers and tokens.

    Raises:
        ValueError: a model without routers.
    """

    def __init__(self, model: nn.Module, hear: Callable[[Given], None], options: ListenOptions) -> None:
        self._hear = hear
        self._listener = RoutingSession.of(model).listen(options)
        self._handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(OwnedHook(self, "_begin_forward")),
            model.register_forward_hook(OwnedHook(self, "_end_forward"), with_kwargs=True),
        ]

    def trace(self, given: Given) -> RoutingTrace:
        """Return the routing of the forward that has just ended, without its graph."""
        return self._listener.trace(given).detach()

    def count_tokens(self, given: Given) -> Tensor | int:
        """Return the number of real tokens of a forward, on its device so that no host waits; 0 if it is not told."""
        return self._listener.count_tokens(given)

    def release(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._listener.release()

    def _begin_forward(self, *_: Any) -> None:
        self._listener.expect()

    def _end_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        try:
            if self._listener.heard:
                self._hear(named_arguments(model, args, kwargs))
        finally:
            self._listener.done()
