"""Hear a session's forwards: the routers and tokens that a listener wants, and the trace that it gets."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor

from consistency_reg.capture import FrozenRouter
from consistency_reg.routing import RoutingTrace
from consistency_reg.session.options import ListenOptions

if TYPE_CHECKING:
    from consistency_reg.session.session import RoutingSession


class Listener:
    """Listens in a :class:`RoutingSession` to the routers and tokens that it was made for.

    Attributes:
        session: what it takes part in.
        options: which routers and tokens it wants.
        expects: whether it will still ask for the trace of the last forward.
    """

    def __init__(self, session: "RoutingSession", options: ListenOptions) -> None:
        self.session = session
        self.options = options
        self.expects = False

    def hears(self, name: str) -> bool:
        """Return whether a router of this name is one of its own."""
        return self.options.layers is None or re.search(self.options.layers, name) is not None

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Return the names of the routers that it may hear."""
        return tuple(name for name in self.session.capture.layer_names if self.hears(name))

    @property
    def heard(self) -> bool:
        """Return whether one of its routers ran in the last forward."""
        return any(self.session.capture.readings(name) for name in self.layer_names)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what runs inside as one step, and keep it until :meth:`done`."""
        self.expect()
        with self.session.capture.recording():
            yield

    def expect(self) -> None:
        """Ask for the trace of the coming forward: it is kept until :meth:`done`."""
        self.expects = True

    def done(self) -> None:
        """Give up the trace of the last forward, whose tensors are freed when no listener needs them."""
        self.session._done(self)

    def trace(self, batch: Any = None) -> RoutingTrace:
        """Return the routing of the last forward or recording, graph kept; the same object for all that ask for it.

        Rows of several forwards in a recording stand below one another.

        Args:
            batch: what the step was given. It tells about tokens what the model was not called with.

        Raises:
            RuntimeError: there was no forward, or a router ran not exactly once in one.
            ValueError: stacks that saw different tokens, or masks that do not describe those that the routers saw.

        Warns:
            UserWarning: once, several models are taken together, or pads or boundaries are hinted at but not known.
        """
        return self.session._trace(self, batch)

    def count_tokens(self, batch: Any) -> Tensor | int:
        """Return the real tokens of a batch, on its device so that no host waits; 0 where they cannot be told."""
        return self.session.count_tokens(batch, self.options.masks)

    def any_router_learns(self) -> bool:
        """Return whether a parameter of a router is trained."""
        return self.session.capture.any_router_learns(self.layer_names)

    def frozen_routers(self) -> dict[str, FrozenRouter]:
        """Return copies of the routers as they are now, by name."""
        return self.session.capture.frozen_routers(self.layer_names)

    def release(self) -> None:
        """Leave the session; the last listener takes the hooks off the module."""
        self.session._leave(self)
