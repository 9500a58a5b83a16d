"""Find the routers of a model, listen to them during a forward pass, and hand over what they decided.

All knowledge of model internals lives here: which module is a router (:mod:`.finding`), what it returns
(:mod:`.adapters`, :mod:`.known`), what it selects by (:mod:`.selection`), when it
counts (:mod:`.recording`), and how its choice is replaced (:mod:`.changing`, :mod:`.weighing`).
"""

from consistency_reg.capture.adapters import RouterAdapter
from consistency_reg.capture.frozen import FrozenRouter
from consistency_reg.capture.known import DEFAULT_ADAPTERS
from consistency_reg.capture.recording import RouterCapture
from consistency_reg.capture.selection import selection_scores
from consistency_reg.capture.weighing import Rerouted, RouterCall, Weighing

__all__ = [
    "DEFAULT_ADAPTERS",
    "FrozenRouter",
    "Rerouted",
    "RouterAdapter",
    "RouterCall",
    "RouterCapture",
    "Weighing",
    "selection_scores",
]
