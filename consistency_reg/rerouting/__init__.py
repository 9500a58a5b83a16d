"""Cache-aware routing: a model whose routers prefer the experts that are in fast memory.

The equations are in :mod:`consistency_reg.functional.cache_aware`; the knowledge of how a router's answer is replaced
is in :mod:`consistency_reg.capture`.

| module | |
|---|---|
| :mod:`.cache_aware_routing` | :class:`CacheAwareRouting`, which changes the choice of every router of a model |
| :mod:`.forwards` | which forward of the model a router's call belongs to |
| :mod:`.running_caches` | caches of experts that are kept next to a KV cache, for decoding |
| :mod:`.schedule` | the strength and the cache of each training step |
| :mod:`.in_training` | the routing in training forwards alone |

Lightning trains with it by :class:`consistency_reg.CacheAwareTraining`, other trainers by
``routing=RoutingSchedule(...)``.
"""

from consistency_reg.rerouting.cache_aware_routing import CacheAwareRouting
from consistency_reg.rerouting.in_training import TrainedRouting
from consistency_reg.rerouting.schedule import RoutingSchedule

__all__ = ["CacheAwareRouting", "RoutingSchedule", "TrainedRouting"]
