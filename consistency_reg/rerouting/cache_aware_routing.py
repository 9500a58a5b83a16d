"""Routing that knows the cache: a model whose routers prefer the experts that are in fast memory."""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from consistency_reg.capture import DEFAULT_ADAPTERS, RouterAdapter, RouterCall
from consistency_reg.capture.changing import check_changeable, check_weights, exchange, given_choice, known_top_k, weigh
from consistency_reg.capture.finding import find_routers
from consistency_reg.capture.hooks import OwnedHook
from consistency_reg.functional.cache_aware import CacheAwareChoice, cache_aware_choice, check_cache_aware
from consistency_reg.masks import Masks
from consistency_reg.rerouting.forwards import Forward, Forwards
from consistency_reg.routing import WEIGHTS

REMEMBERED = 16  # forwards whose backward passes are still to come, as with a loss of several forwards


class CacheAwareRouting:
    """Lets every router of a model prefer the experts that a cache of ``cache_ratio * K`` slots a layer would hold.

    A context manager, or :meth:`attach` and :meth:`detach`. The model's code and weights stay as they are: what its
    routers return is replaced. For each token, with scores z by which the router selects, experts that the LRU cache
    of this layer and document holds get the bonus ``strength * delta``, where delta is the mean of ``max(z) - min(z)``
    over the document so far; the K best are chosen, and weighed by the router's own rule from its unchanged scores.
    Equations: :func:`consistency_reg.functional.cache_aware_ids`.

    A forward without a KV cache is whole sequences; with one it goes on with the caches of experts that stand beside
    that KV cache, row by row, so ``generate`` chooses as one forward of the whole text does. Beams, copies of a KV
    cache and generations that take turns keep their caches apart.

    A :class:`~consistency_reg.RouterCapture` sees what was chosen, and the scores as they were. Gradients flow through
    the weights of the chosen experts, and activation checkpointing chooses the same again. Under ``torch.compile``
    attach before the first compiled forward.

    Args:
        model: any module that contains routers which are supported, see docs/architectures.md.
        cache_ratio: slots of the cache of each layer, in units of its K; rounded to whole slots.
        strength: of the preference, 0 for none. 0.1 is usual for "prior".
        guaranteed: so many of the router's best experts are always chosen; 0 to K.
        method: "prior" (above), "max_rank" or "cumulative".
        layers: regular expression; change the routers whose name matches it (``re.search``) alone.
        adapters: kinds of routers to look for, before the built-in ones.
        masks: ``forward's arguments by name -> (valid, document_ids)``, each [B, T] or None; reads ``attention_mask``
            and ``document_ids`` or ``position_ids`` of the innermost model around the router when None.

    Raises:
        ValueError: a strength that is negative or not a number; fewer slots than K; ``guaranteed`` outside 0 to K; a
            router whose choice cannot be changed or whose weights are not known; a model without routers. In a
            forward: rows that are not those of the KV cache.
        RuntimeError: it is attached already; in a forward, routers that were not called, a KV cache that was cut.

    Example:
        >>> class ToyTopKRouter(nn.Linear):
        ...     def forward(self, x):
        ...         logits = super().forward(x).flatten(0, 1)
        ...         weights, ids = logits.softmax(-1).topk(2)
        ...         return logits, weights / weights.sum(-1, keepdim=True), ids
        >>> model = nn.Sequential(ToyTopKRouter(8, 6))
        >>> with CacheAwareRouting(model, cache_ratio=2.0, strength=0.1) as routing:
        ...     _ = model(torch.randn(3, 5, 8))
        >>> routing.hits + routing.misses
        30
    """

    def __init__(
        self,
        model: nn.Module,
        cache_ratio: float = 2.0,
        strength: float = 0.1,
        guaranteed: int = 1,
        method: str = "prior",
        layers: str | None = None,
        adapters: Sequence[RouterAdapter] = (),
        masks: Callable[[Mapping[str, Any]], Masks] | None = None,
    ) -> None:
        self.model = model
        self.guaranteed = guaranteed
        self.method = method
        self._routers = find_routers(model, (*adapters, *DEFAULT_ADAPTERS), layers)
        for router in self._routers.values():
            check_changeable(router)
        self._cache_ratio, self._strength = 1.0, 0.0
        self.cache_ratio = cache_ratio
        self.strength = strength
        self._forwards = Forwards(model, self.layer_names, masks)
        self._handles: list[RemovableHandle] = []
        self._checked: set[str] = set()  # routers whose weights are what their adapters say
        self._shapes: dict[str, tuple[int, int]] = {}
        self._calls: dict[str, RouterCall] = {}  # of routers whose experts are given what was chosen elsewhere
        self.reset()

    @classmethod
    def from_config(cls, model: nn.Module, **changes: Any) -> "CacheAwareRouting":
        """Return the routing, not attached, that a model of `consistency-reg fit` is to be deployed with.

        Args:
            model: whose configuration says so under ``cache_aware_routing``.
            changes: arguments that are to differ.

        Raises:
            ValueError: the configuration says nothing of it.
        """
        given = getattr(getattr(model, "config", None), "cache_aware_routing", None)
        if not isinstance(given, Mapping):
            raise ValueError(
                f"the configuration of {type(model).__name__} must have cache_aware_routing, as `consistency-reg fit` "
                f"writes it, got {given!r}: give the arguments of CacheAwareRouting instead"
            )
        return cls(model, **{**given, **changes})

    @property
    def strength(self) -> float:
        """Return the strength from the next forward on."""
        return self._strength

    @strength.setter
    def strength(self, strength: float) -> None:
        if not isinstance(strength, Real) or not (math.isfinite(strength) and strength >= 0):
            raise ValueError(f"strength must be a finite number of at least 0, got {strength!r}")
        self._check(self.cache_ratio, float(strength))
        self._strength = float(strength)

    @property
    def cache_ratio(self) -> float:
        """Slots of each layer's cache in units of its K, from the next forward on."""
        return self._cache_ratio

    @cache_ratio.setter
    def cache_ratio(self, cache_ratio: float) -> None:
        if not isinstance(cache_ratio, Real) or not 1 <= cache_ratio < math.inf:
            raise ValueError(
                "cache_ratio must be a number of at least 1, so that a cache has a slot for each of the K experts of a "
                f"token, got {cache_ratio!r}"
            )
        self._check(float(cache_ratio), 0.0)
        self._cache_ratio = float(cache_ratio)

    @property
    def active(self) -> bool:
        """Return whether the next forwards are changed (and counted); may be set."""
        return self._forwards.active

    @active.setter
    def active(self, active: bool) -> None:
        self._forwards.active = active

    @property
    def given_masks(self) -> Masks | None:
        """Return the ``(valid, document_ids)`` that the next forwards have in place of their arguments'; may be set."""
        return self._forwards.given_masks

    @given_masks.setter
    def given_masks(self, masks: Masks | None) -> None:
        self._forwards.given_masks = masks

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Return the routers' names in the model, in its order."""
        return tuple(self._routers)

    @property
    def layer_hits(self) -> dict[str, int]:
        """Return the uses of experts that were in their layer's cache, by the router's name, since the last reset."""
        return {name: int(self._hits.get(name, 0)) for name in self._routers}

    @property
    def layer_misses(self) -> dict[str, int]:
        """Return the uses of experts that were not, the first ones of a document included, by the router's name."""
        return {name: int(self._uses.get(name, 0)) - hits for name, hits in self.layer_hits.items()}

    @property
    def hits(self) -> int:
        """Return the sum of :attr:`layer_hits`."""
        return sum(self.layer_hits.values())

    @property
    def misses(self) -> int:
        """Return the sum of :attr:`layer_misses`."""
        return sum(self.layer_misses.values())

    @property
    def counts(self) -> Tensor:
        """Return the hits and misses of all layers since the last reset, [2] int64, on the model's device: no wait."""
        if not self._hits:
            return torch.zeros(2).long()
        hits = torch.stack(list(self._hits.values())).sum()
        return torch.stack([hits, sum(self._uses.values()) - hits])

    def reset(self) -> None:
        """Set the counts to zero and empty all caches: a KV cache that is gone on with begins with empty ones."""
        self._hits: dict[str, Tensor] = {}
        self._uses: dict[str, Tensor | int] = {}  # numbers where no token is padding: nothing to wait for or to launch
        self._forwards.forget()
        self._remembered: dict[str, deque[tuple[Tensor, Tensor]]] = {
            name: deque(maxlen=REMEMBERED) for name in self._routers
        }

    def attach(self) -> "CacheAwareRouting":
        """Change the routing from the next forward on.

        Raises:
            RuntimeError: a routing is attached to one of these routers already.
        """
        for router in self._routers.values():
            for hook in router.module._forward_hooks.values():
                if isinstance(hook, OwnedHook) and isinstance(hook.owner, CacheAwareRouting):
                    raise RuntimeError(f"a CacheAwareRouting is attached to {router} already: detach() it first")
        self._handles += self._forwards.listen()
        listen = self._handles.append
        for name, router in self._routers.items():
            block = self.model.get_submodule(router.block_name)
            listen(block.register_forward_pre_hook(OwnedHook(self, "_see_block", name), with_kwargs=True))
            hook = OwnedHook(self, "_reroute", name)  # before those who listen to the router
            listen(router.module.register_forward_hook(hook, with_kwargs=True, prepend=True))
            if router.experts is not None:
                hook = OwnedHook(self, "_reroute_experts", name)
                listen(router.experts.register_forward_pre_hook(hook, with_kwargs=True, prepend=True))
        return self

    def detach(self) -> None:
        """Leave the model as it was; without effect when not attached. The counts stay."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._calls.clear()

    def __enter__(self) -> "CacheAwareRouting":
        return self.attach()

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def _check(self, cache_ratio: float, strength: float) -> None:
        for name, router in self._routers.items():
            if (top_k := known_top_k(self.model, router)) is not None:
                self._check_layer(name, top_k, top_k + 1, cache_ratio, strength)

    def _check_layer(self, name: str, top_k: int, num_experts: int, cache_ratio: float, strength: float) -> None:
        try:
            slots = _slots(cache_ratio, top_k)
            check_cache_aware(num_experts, top_k, slots, strength, self.guaranteed, self.method)
        except ValueError as error:
            raise ValueError(f"{self._routers[name]}: {error}") from None

    def _see_block(self, name: str, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(hidden, Tensor) and hidden.dim() == 3:
            self._shapes[name] = (hidden.shape[0], hidden.shape[1])

    @torch.compiler.disable
    def _reroute(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not self._forwards.active:
            return None
        router = self._routers[name]
        logits, own_ids = router.adapter.read(module, output)
        block = self.model.get_submodule(router.block_name)
        function = router.adapter.read_score_function(module)
        given = (*args, *kwargs.values())
        call = RouterCall(module, block, given, output, logits.reshape(-1, logits.shape[-1]), function)
        if own_ids is None:  # the experts are given them
            self._calls[name] = call
            return None
        own_ids = own_ids.reshape(-1, own_ids.shape[-1]).long()
        chosen = self._choose(name, call, own_ids, lambda: router.adapter.own_weights(call, own_ids))
        return None if chosen is None else router.adapter.reroute(call, chosen, weigh(router, call, chosen))

    @torch.compiler.disable
    def _reroute_experts(self, name: str, experts: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if (call := self._calls.pop(name, None)) is None:
            return None
        own_ids, own_weights = given_choice(args, kwargs)
        chosen = self._choose(name, call, own_ids.reshape(-1, own_ids.shape[-1]).long(), lambda: own_weights)
        return None if chosen is None else exchange(args, kwargs, chosen, weigh(self._routers[name], call, chosen))

    def _choose(self, name: str, call: RouterCall, own_ids: Tensor, own_weights: Callable[[], Tensor]) -> Tensor | None:
        """Return the chosen experts [N, K] of a call, or None where they are the router's own."""
        forward = self._forwards.of(name)
        if forward is not None:
            forward.heard.add(name)
        if forward is None or torch._C._current_graph_task_id() != -1:  # within a backward pass
            return self._chosen_before(name, own_ids)
        if name not in self._checked:
            self._check_layer(name, own_ids.shape[-1], call.logits.shape[-1] + 1, self.cache_ratio, self.strength)
            with torch.no_grad():  # a checkpointed layer must save the same when it runs again
                check_weights(self._routers[name], call, own_ids, own_weights())
            self._checked.add(name)
        choice = self._choice(name, call, own_ids, forward)
        forward.running.states[name] = choice.state
        self._count(name, choice, forward)
        chosen = choice.expert_ids.reshape(own_ids.shape)
        if forward.remembers:
            self._remembered[name].append((own_ids, chosen))
        return chosen if self.strength else None

    @torch.no_grad()
    def _choice(self, name: str, call: RouterCall, own_ids: Tensor, forward: Forward) -> CacheAwareChoice:
        router = self._routers[name]
        shape = self._shape(name, call, len(own_ids), forward)
        scores = router.adapter.read_scores(call.router, call.logits, own_ids, call.args[1:])
        top_k, num_experts = own_ids.shape[-1], scores.shape[-1]
        probabilities = None
        if self.method == "cumulative":
            weights = WEIGHTS[call.score_function](call.logits.float())
            probabilities = (weights / weights.sum(dim=-1, keepdim=True)).view(*shape, -1)
        return cache_aware_choice(
            scores.view(*shape, -1),
            top_k,
            _slots(self.cache_ratio, top_k),
            self.strength if num_experts > top_k else 0.0,
            self.guaranteed,
            *forward.masks_of(shape),
            method=self.method,
            probabilities=probabilities,
            own_ids=own_ids.view(*shape, -1),
            state=forward.running.states.get(name),
        )

    def _shape(self, name: str, call: RouterCall, tokens: int, forward: Forward) -> tuple[int, int]:
        """Return the (B, T) of a call on so many tokens."""
        hidden = call.args[0] if call.args and isinstance(call.args[0], Tensor) and call.args[0].dim() == 3 else None
        own = None if hidden is None else (hidden.shape[0], hidden.shape[1])
        for shape in (own, forward.shape, self._shapes.get(name)):
            if shape is not None and shape[0] * shape[1] == tokens:
                return shape
        raise RuntimeError(
            f"{self._routers[name]} ran on {tokens} tokens, which are not those of the batch "
            f"({forward.shape or 'of unknown shape'}): the rows of its caches cannot be told"
        )

    def _chosen_before(self, name: str, own_ids: Tensor) -> Tensor | None:
        """Return what was chosen when a checkpointed layer ran first: that of the forward with the same own choice."""
        found = [pair for pair in self._remembered[name] if pair[0].shape == own_ids.shape]
        if not found:
            raise RuntimeError(
                f"{self._routers[name]} ran outside of a forward of the {self._forwards.stack_name(name)} around it: "
                "the rows of its caches cannot be told"
            )
        if not self.strength:
            return None
        if len(found) > 1:
            found.sort(key=lambda pair: int((pair[0] == own_ids).sum()))
        return found[-1][1]

    @torch.no_grad()
    def _count(self, name: str, choice: CacheAwareChoice, forward: Forward) -> None:
        B, T, K = choice.expert_ids.shape
        valid, _ = forward.masks_of((B, T))
        hits = (choice.hits if valid is None else choice.hits & valid[:, :, None]).sum()
        uses = B * T * K if valid is None else valid.sum() * K
        self._hits[name] = self._hits[name] + hits if name in self._hits else hits
        self._uses[name] = self._uses.get(name, 0) + uses


def _slots(cache_ratio: float, top_k: int) -> int:
    return round(cache_ratio * top_k)
