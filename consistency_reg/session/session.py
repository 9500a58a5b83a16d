"""The session of a module: it records a step once, and makes its trace once, for all who ask."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from consistency_reg.capture import RouterCapture
from consistency_reg.capture.hooks import OwnedHook
from consistency_reg.capture.readings import Reading
from consistency_reg.capture.stacks import Stack, counted_forwards, names_of, stacks_of, trained_stacks
from consistency_reg.capture.traces import join
from consistency_reg.masks import Masks, count_tokens, given_by, token_ids
from consistency_reg.masks.batches import KEYS
from consistency_reg.routing import RoutingTrace
from consistency_reg.session.listener import Listener
from consistency_reg.session.options import ListenOptions
from consistency_reg.session.tokens import TokenReader, different_tokens


class RoutingSession:
    """Listens to the routers of a module once, however many want to know what they decided.

    A module has one session while somebody listens: :meth:`of` finds or makes it, :meth:`listen` joins, and when the
    last :class:`Listener` is released the module is as it was. Each forward or recording gives one trace, made when it
    is first asked for. A copy or a pickle of the module has none.

    Which routers: those of the stacks that ran with gradient and hold parameters of the optimizers, unless a listener
    names others. Which tokens: docs/tokens.md.

    Example:
        >>> class ToyTopKRouter(nn.Linear):
        ...     def forward(self, x):
        ...         logits = super().forward(x)
        ...         weights, ids = logits.softmax(-1).topk(2)
        ...         return logits, weights, ids
        >>> model = nn.Sequential(ToyTopKRouter(8, 4))
        >>> one, other = RoutingSession.of(model).listen(), RoutingSession.of(model).listen()
        >>> one.session is other.session
        True
        >>> with one.recording(), other.recording():
        ...     _ = model(torch.randn(3, 5, 8))
        >>> one.trace() is other.trace(), one.trace().shape
        (True, (3, 5))
        >>> one.release(), other.release()
        (None, None)
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.optimizers: Callable[[], Iterable[torch.optim.Optimizer]] | None = None
        self._capture: RouterCapture | None = None
        self._stacks: list[Stack] = []
        self._listeners: list[Listener] = []
        self._traces: list[tuple[tuple[Any, ...], list[Reading], Any, RoutingTrace]] = []
        self._counted: tuple[Any, Any, Tensor | int] | None = None  # the real tokens of a batch, by whose masks
        self._tokens = TokenReader(module)
        self._mark: Any = None

    @classmethod
    def of(cls, module: nn.Module) -> "RoutingSession":
        """Return the session of a module, a new one where nobody listens."""
        owners = (hook.owner for hook in module._forward_pre_hooks.values() if isinstance(hook, OwnedHook))
        return next((owner for owner in owners if isinstance(owner, cls)), None) or cls(module)

    @property
    def capture(self) -> RouterCapture:
        """Return the capture that listens to the routers."""
        assert self._capture is not None
        return self._capture

    def listen(
        self,
        options: ListenOptions | None = None,
        *,
        optimizers: Callable[[], Iterable[torch.optim.Optimizer]] | None = None,
    ) -> Listener:
        """Join, before the first forward where it is compiled.

        Args:
            options: which routers and tokens; those that the training is about when None.
            optimizers: what trains the module.

        Raises:
            ValueError: a module without routers, or no name of one matches ``options.layers``.
        """
        listener = Listener(self, options or ListenOptions())
        self._listeners.append(listener)
        try:
            self._attach()
        except BaseException:
            self._leave(listener)
            raise
        self.optimizers = self.optimizers or optimizers
        return listener

    def _attach(self) -> None:
        """Capture the routers that any listener wants."""
        patterns = [listener.options.layers for listener in self._listeners]
        layers = None if None in patterns else "|".join(f"(?:{one})" for one in dict.fromkeys(map(str, patterns)))
        adapters = tuple(dict.fromkeys(one for listener in self._listeners for one in listener.options.adapters))
        keep_inputs = any(listener.options.keep_inputs for listener in self._listeners)
        old = self._capture
        if old is not None and (old.layers, old.adapters, old.keep_inputs) == (layers, adapters, keep_inputs):
            return
        new = RouterCapture(self.module, adapters, keep_inputs=keep_inputs, layers=layers)
        if old is not None:
            old.detach()
        self._capture = new.attach()
        self._stacks = stacks_of(new)
        self._traces.clear()
        if self._mark is None:
            self._mark = self.module.register_forward_pre_hook(OwnedHook(self, "_is_here"))

    def _is_here(self, *_: Any) -> None:
        """Do nothing: the hook says whose session it is."""

    def _leave(self, listener: Listener) -> None:
        if listener in self._listeners:
            self._done(listener)
            self._listeners.remove(listener)
        if self._listeners:
            return
        if self._capture is not None:
            self._capture.detach()
            self._capture = None
        if self._mark is not None:
            self._mark.remove()
            self._mark = None

    def _done(self, listener: Listener) -> None:
        listener.expects = False
        if not any(other.expects for other in self._listeners):
            self._traces.clear()
            if self._capture is not None:
                self._capture.clear()

    # --- the trace --------------------------------------------------------------------------------------------------

    def _trace(self, listener: Listener, batch: Any) -> RoutingTrace:
        options, given = listener.options, given_by(batch)
        told = tuple(id(given[name]) for name in KEYS if name in given)
        key = (options.layers, options.masks, options.tokens, told if told or options.masks is None else id(batch))
        readings = [one for name in self.capture.layer_names for one in self.capture.readings(name)]
        self._traces = [kept for kept in self._traces if _same(kept[1], readings)]
        known = next((trace for known_key, _, _, trace in self._traces if known_key == key), None)
        if known is None:
            known = self._new_trace(listener, batch, given)
            self._traces.append((key, readings, batch, known))  # which holds what the key names by its id
            ids = token_ids(batch)
            if options.tokens == "all" and batch is not None and (ids is None or ids.shape == known.shape):
                real = known.shape[0] * known.shape[1] if known.valid is None else known.valid.sum()
                self._counted = (_first_tensor(batch), options.masks, real)
        return known

    def count_tokens(self, batch: Any, masks: Callable[[Any], Masks] | None = None) -> Tensor | int:
        """Return the real tokens of a batch, on its device so that no host waits; 0 where they cannot be told."""
        known, first = self._counted, _first_tensor(batch)
        if known is None or first is None or known[0] is not first or known[1] is not masks:
            known = self._counted = (first, masks, count_tokens(batch, masks))
        return known[2]

    def _new_trace(self, listener: Listener, batch: Any, given: Mapping[str, Any]) -> RoutingTrace:
        stacks = self._choose(listener)
        forwards = [counted_forwards(self.capture, stack.names) for stack in stacks]
        if len({len(of_stack) for of_stack in forwards}) > 1:
            raise different_tokens(stacks, [f"{len(of_stack)} forwards" for of_stack in forwards])
        if listener.options.masks is not None and len(forwards[0]) > 1:
            raise ValueError(
                f"masks= gives the masks of one forward, but {stacks[0]} ran {len(forwards[0])} times in this step"
            )
        order = [name for name in self.capture.layer_names if name in names_of(stacks)]
        traces = []
        for of_stacks in zip(*forwards, strict=True):
            shape, masks = self._tokens.agreed(listener, stacks, of_stacks, batch, given)
            joined = {name: reading for forward in of_stacks for name, reading in forward.items()}
            traces.append(self.capture.make_trace({name: joined[name] for name in order}, shape, *masks))
        if listener.options.layers is None:
            self._tokens.warn_of_several_models(stacks)
        return join(traces)

    def _choose(self, listener: Listener) -> tuple[Stack, ...]:
        if listener.options.layers is not None:
            chosen = [(stack, [name for name in stack.names if listener.hears(name)]) for stack in self._stacks]
            return tuple(Stack(stack.caller, stack.path, tuple(names)) for stack, names in chosen if names)
        stacks = trained_stacks(self.capture, self._stacks, self._parameters())
        if not stacks:
            self.capture.forwards(listener.layer_names)  # says why
        return stacks

    def _parameters(self) -> set[int] | None:
        optimizers = list(self.optimizers()) if self.optimizers is not None else []
        held = {id(one) for optimizer in optimizers for group in optimizer.param_groups for one in group["params"]}
        return held or None


def _first_tensor(batch: Any) -> Tensor | None:
    """Return the first tensor in a batch, by which the same batch is known in another container."""
    if isinstance(batch, Tensor):
        return batch
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    return next((found for part in parts if (found := _first_tensor(part)) is not None), None)


def _same(kept: Sequence[Reading], now: Sequence[Reading]) -> bool:
    return len(kept) == len(now) and all(one is other for one, other in zip(kept, now, strict=True))
