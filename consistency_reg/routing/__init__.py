"""The routing of one forward pass: of a layer, of layers of one shape, of a model; and the checks of such input.

| module | |
|---|---|
| :mod:`.trace` | :class:`RoutingTrace`, what the capture hands to losses and metrics |
| :mod:`.layers` | one layer of it, and a stack of layers of one shape |
| :mod:`.weights` | how a router's logits become weights |
| :mod:`.documents` | which tokens belong together |
| :mod:`.checks` | checks of expert ids and masks |
"""

from consistency_reg.routing.checks import check_expert_ids, check_id_shape, check_masks
from consistency_reg.routing.layers import LayerRouting, LayerStack
from consistency_reg.routing.trace import RoutingTrace
from consistency_reg.routing.weights import WEIGHTS, probabilities

__all__ = [
    "WEIGHTS",
    "LayerRouting",
    "LayerStack",
    "RoutingTrace",
    "check_expert_ids",
    "check_id_shape",
    "check_masks",
    "probabilities",
]
