"""Caches of experts that continue from one forward to the next, next to the KV cache of the same rows.

A KV cache knows how far its rows have come, and which rows they are: beam search reorders them, a copy of it goes its
own way. So the caches of experts are kept on it, by each router's name.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from consistency_reg.functional.cache_aware import CacheAwareState

KV_CACHES = ("past_key_values", "cache_params")
PLACE = "_caches_of_experts"  # attribute of a KV cache


@dataclass
class RunningCaches:
    """Holds the caches of experts of the rows of one KV cache.

    Attributes:
        owner: whose they are; the caches of another owner are not continued.
        states: by the router's name, after the last token.
        length: tokens that the KV cache held then, None where it cannot tell.
    """

    owner: object
    states: dict[str, CacheAwareState] = field(default_factory=dict)
    length: int | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "RunningCaches":
        return RunningCaches(self.owner, dict(self.states), self.length)  # the states are never changed in place

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order."""
        self.states = {name: state.select(rows.to(state.tokens.device)) for name, state in self.states.items()}


def kv_cache(values: Mapping[str, Any]) -> Any:
    """Return the KV cache among a forward's arguments or in what it returned, or None."""
    return next((values[name] for name in KV_CACHES if values.get(name) is not None), None)


def cached_tokens(cache: Any) -> int | None:
    """Return how many tokens a KV cache holds, None where it cannot tell."""
    with suppress(Exception):  # caches of linear attention and of old models have no length
        return int(cache.get_seq_length())
    return None


def running_caches(cache: Any, owner: object, rows: int | None) -> RunningCaches | None:
    """Return the caches of experts that stand beside a KV cache, None where it begins.

    Raises:
        RuntimeError: the KV cache was cut since.
        ValueError: they are not of so many rows.
    """
    running: RunningCaches | None = getattr(cache, PLACE, None)
    length = cached_tokens(cache)
    if running is None or running.owner is not owner or length == 0:
        return None
    if length != running.length:
        raise RuntimeError(
            f"the KV cache held {running.length} tokens after the last forward and holds {length} now: the caches of "
            "experts cannot follow a KV cache that is cut (crop, assisted generation)"
        )
    were = {state.tokens.shape[-1] for state in running.states.values()} - {rows}
    if were and rows is not None:
        raise ValueError(
            f"the batch must have the rows of its KV cache, got {rows} rows for caches of experts of {were.pop()}: a "
            "row goes on with its own cache, so reorder or select rows by the KV cache's own methods"
        )
    return running


def keep(cache: Any, running: RunningCaches) -> None:
    """Keep caches of experts beside a KV cache, and let them follow its rows."""
    running.length = cached_tokens(cache)
    setattr(cache, PLACE, running)
    for name, follow in FOLLOWING.items():
        if hasattr(cache, name) and name not in vars(cache):
            setattr(cache, name, MethodType(follow, cache))  # a copy of the cache has the method of the copy


def _reorder_cache(cache: Any, beam_idx: Tensor) -> Any:
    getattr(cache, PLACE).select(beam_idx)
    return type(cache).reorder_cache(cache, beam_idx)


def _batch_select_indices(cache: Any, indices: Tensor) -> Any:
    getattr(cache, PLACE).select(indices)
    return type(cache).batch_select_indices(cache, indices)


def _batch_repeat_interleave(cache: Any, repeats: int) -> Any:
    running: RunningCaches = getattr(cache, PLACE)
    for state in running.states.values():
        rows = torch.arange(state.tokens.shape[-1], device=state.tokens.device).repeat_interleave(repeats)
        running.select(rows)
        break
    return type(cache).batch_repeat_interleave(cache, repeats)


FOLLOWING: dict[str, Callable[..., Any]] = {
    "reorder_cache": _reorder_cache,
    "batch_select_indices": _batch_select_indices,
    "batch_repeat_interleave": _batch_repeat_interleave,
}
