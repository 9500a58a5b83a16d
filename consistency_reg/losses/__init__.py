"""Training terms: modules that take a :class:`~consistency_reg.RoutingTrace` and return an unweighted scalar."""

from collections.abc import Mapping
from inspect import Parameter, signature
from types import MappingProxyType
from typing import Any

from consistency_reg.losses.adjacent import AdjacentLoss
from consistency_reg.losses.anchor import RouterAnchorLoss
from consistency_reg.losses.balance import LoadBalanceLoss
from consistency_reg.losses.base import RoutingLoss
from consistency_reg.losses.bles import BlockwiseLoss
from consistency_reg.losses.cache import CacheConsistencyLoss
from consistency_reg.losses.envelope import EnvelopeLoss
from consistency_reg.losses.melinoe import MelinoeLoss
from consistency_reg.losses.remoe import ReMoELoss
from consistency_reg.losses.srp import LocalConsistencyLoss
from consistency_reg.losses.sticky import StickyLoss
from consistency_reg.losses.z import RouterZLoss

__all__ = [
    "LOCALITY_LOSSES",
    "AdjacentLoss",
    "BlockwiseLoss",
    "CacheConsistencyLoss",
    "EnvelopeLoss",
    "LoadBalanceLoss",
    "LocalConsistencyLoss",
    "MelinoeLoss",
    "ReMoELoss",
    "RouterAnchorLoss",
    "RouterZLoss",
    "RoutingLoss",
    "StickyLoss",
    "make_loss",
]

LOCALITY_LOSSES: Mapping[str, type[RoutingLoss]] = MappingProxyType(
    {
        "srp": LocalConsistencyLoss,
        "lru": CacheConsistencyLoss,
        "remoe": ReMoELoss,
        "sticky": StickyLoss,
        "adjacent": AdjacentLoss,
        "melinoe": MelinoeLoss,
        "bles": BlockwiseLoss,
    }
)


def make_loss(name: str, **options: Any) -> RoutingLoss:
    """Return the locality loss of that name, as a recipe writes it.

    Args:
        name: one of :data:`LOCALITY_LOSSES`.
        options: of the class.

    Raises:
        ValueError: an unknown name, or a value that the class refuses.
        TypeError: an option that the class does not have.

    Example:
        >>> make_loss("sticky", window=8)
        StickyLoss(smooth=1.0, anchor=1.0, window=8)
    """
    if name not in LOCALITY_LOSSES:
        raise ValueError(f"name must be one of {list(LOCALITY_LOSSES)}, got {name!r}")
    parameters = signature(LOCALITY_LOSSES[name]).parameters.values()
    known = [p.name for p in parameters if p.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)]
    unknown = [option for option in options if option not in known]
    if unknown:
        raise TypeError(f"options of loss {name!r} must be among {known}, got {unknown}")
    return LOCALITY_LOSSES[name](**options)
