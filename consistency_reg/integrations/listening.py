"""Hear each forward of a model, with its arguments by name, for whoever has no trainer's batches."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from consistency_reg.capture import RouterAdapter, RouterCapture
from consistency_reg.hooks import OwnedHook
from consistency_reg.masks import Masks, batch_masks, named_arguments
from consistency_reg.routing import RoutingTrace

Given = Mapping[str, Any]


class ForwardListener:
    """Calls ``hear(given)`` at the end of each forward of a model in which routers ran; in it :meth:`trace` works.

    Args:
        model: holds routers.
        hear: is given the arguments of the forward by name.
        masks: ``arguments -> (valid, document_ids)``; reads the usual names when None.
        adapters: kinds of routers that the capture does not know by itself.
        layers: regular expression, the routers to capture; all when None.

    Raises:
        ValueError: a model without routers.
    """

    def __init__(
        self,
        model: nn.Module,
        hear: Callable[[Given], None],
        *,
        masks: Callable[[Given], Masks] | None = None,
        adapters: Sequence[RouterAdapter] = (),
        layers: str | None = None,
    ) -> None:
        self._hear = hear
        self._masks = masks or batch_masks
        self._capture = RouterCapture(model, adapters, layers=layers).attach()
        hook = OwnedHook(self, "_end_forward")
        self._handle: RemovableHandle = model.register_forward_hook(hook, with_kwargs=True)

    def trace(self, given: Given) -> RoutingTrace:
        """Return the routing of the forward that has just ended, without its graph."""
        return self._capture.trace(*self._masks(given)).detach()

    def count_tokens(self, given: Given) -> Tensor | int:
        """Return the number of real tokens of a forward, on its device so that no host waits; 0 if it is not told."""
        valid, ids = self._masks(given)[0], given.get("input_ids")
        if valid is not None:
            return valid.sum()
        return ids.numel() if isinstance(ids, Tensor) else 0

    def release(self) -> None:
        """Take the hooks off the model."""
        self._handle.remove()
        self._capture.detach()

    def _end_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._capture.heard:
            self._hear(named_arguments(model, args, kwargs))
        self._capture.clear()
