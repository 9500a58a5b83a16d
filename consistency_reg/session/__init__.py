"""Listen to a module once for all who want to know its routing.

A regularizer, a monitor, an anchor and a progress bar each hold a :class:`Listener` of the module's
:class:`RoutingSession`, so that a step is recorded once, its masks are read once, and its trace is made once.
"""

from consistency_reg.session.listener import Listener
from consistency_reg.session.options import ListenOptions, Which
from consistency_reg.session.session import RoutingSession

__all__ = ["ListenOptions", "Listener", "RoutingSession", "Which"]
