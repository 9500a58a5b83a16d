"""The one ear at a model that is trained or validated, for all that want to know its routing."""

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from consistency_reg.capture import FrozenRouter, RouterAdapter, RouterCapture
from consistency_reg.capture.calls import told_of
from consistency_reg.capture.hooks import OwnedHook
from consistency_reg.capture.joining import join
from consistency_reg.capture.readings import Forward, Reading, shape_of
from consistency_reg.capture.stacks import Stack, counted_forwards, names_of, stacks_of, trained_stacks
from consistency_reg.hints import inner_batches, looks_padded, unread_hints
from consistency_reg.masks import (
    DESCRIBES_TOKENS,
    KEYS,
    Masks,
    Shape,
    count_tokens,
    given_by,
    has_tokens,
    labelled_tokens,
    read_masks,
    token_ids,
    token_shape,
)
from consistency_reg.routing import RoutingTrace

Which = Literal["all", "labels"]
LOOKS = 8  # batches that are looked at for pads without a mask


def check_tokens(tokens: str) -> Which:
    """Return which tokens count; ValueError unless it is "all" or "labels"."""
    if tokens not in ("all", "labels"):
        raise ValueError(f"tokens must be 'all' or 'labels', got {tokens!r}")
    return tokens  # type: ignore[return-value]


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
        self._said: set[str] = set()
        self._looks_left = LOOKS
        self._mark: Any = None

    @classmethod
    def of(cls, module: nn.Module) -> "RoutingSession":
        """Return the session of a module, a new one where nobody listens."""
        owners = (hook.owner for hook in module._forward_pre_hooks.values() if isinstance(hook, OwnedHook))
        return next((owner for owner in owners if isinstance(owner, cls)), None) or cls(module)

    @property
    def capture(self) -> RouterCapture:
        """What listens."""
        assert self._capture is not None
        return self._capture

    def listen(
        self,
        *,
        layers: str | None = None,
        adapters: Sequence[RouterAdapter] = (),
        masks: Callable[[Any], Masks] | None = None,
        tokens: Which = "all",
        keep_inputs: bool = False,
        optimizers: Callable[[], Iterable[torch.optim.Optimizer]] | None = None,
    ) -> "Listener":
        """Join, before the first forward where it is compiled.

        Args:
            layers: regular expression on the routers' names; those that the training is about when None.
            adapters: kinds of routers that are not known.
            masks: ``batch -> (valid, document_ids)``, in place of what is read.
            tokens: "labels" for those that have a label alone.
            keep_inputs: keep the routers' inputs too.
            optimizers: what trains the module.

        Raises:
            ValueError: a module without routers, or no name of one matches ``layers``.
        """
        listener = Listener(self, layers, tuple(adapters), masks, check_tokens(tokens), keep_inputs)
        self._listeners.append(listener)
        try:
            self._attach()
        except BaseException:
            self._leave(listener)
            raise
        self.optimizers = self.optimizers or optimizers
        return listener

    def _attach(self) -> None:
        """Listen to what all listeners want."""
        patterns = [listener.layers for listener in self._listeners]
        layers = None if None in patterns else "|".join(f"(?:{one})" for one in dict.fromkeys(map(str, patterns)))
        adapters = tuple(dict.fromkeys(one for listener in self._listeners for one in listener.adapters))
        keep_inputs = any(listener.keep_inputs for listener in self._listeners)
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

    def _leave(self, listener: "Listener") -> None:
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

    def _done(self, listener: "Listener") -> None:
        listener.expects = False
        if not any(other.expects for other in self._listeners):
            self._traces.clear()
            if self._capture is not None:
                self._capture.clear()

    # --- the trace --------------------------------------------------------------------------------------------------

    def _trace(self, listener: "Listener", batch: Any) -> RoutingTrace:
        given = given_by(batch)
        told = tuple(id(given[name]) for name in KEYS if name in given)
        key = (listener.layers, listener.masks, listener.tokens, told if told or listener.masks is None else id(batch))
        readings = [one for name in self.capture.layer_names for one in self.capture.readings(name)]
        self._traces = [kept for kept in self._traces if _same(kept[1], readings)]
        known = next((trace for known_key, _, _, trace in self._traces if known_key == key), None)
        if known is None:
            known = self._new_trace(listener, batch, given)
            self._traces.append((key, readings, batch, known))  # which holds what the key names by its id
            ids = token_ids(batch)
            if listener.tokens == "all" and batch is not None and (ids is None or ids.shape == known.shape):
                real = known.shape[0] * known.shape[1] if known.valid is None else known.valid.sum()
                self._counted = (_first_tensor(batch), listener.masks, real)
        return known

    def count_tokens(self, batch: Any, masks: Callable[[Any], Masks] | None = None) -> Tensor | int:
        """Return the real tokens of a batch, on its device so that no host waits; 0 where they cannot be told."""
        known, first = self._counted, _first_tensor(batch)
        if known is None or first is None or known[0] is not first or known[1] is not masks:
            known = self._counted = (first, masks, count_tokens(batch, masks))
        return known[2]

    def _new_trace(self, listener: "Listener", batch: Any, given: Mapping[str, Any]) -> RoutingTrace:
        stacks = self._choose(listener)
        forwards = [counted_forwards(self.capture, stack.names) for stack in stacks]
        if len({len(of_stack) for of_stack in forwards}) > 1:
            raise self._refusal(stacks, [f"{len(of_stack)} forwards" for of_stack in forwards])
        if listener.masks is not None and len(forwards[0]) > 1:
            raise ValueError(
                f"masks= gives the masks of one forward, but {stacks[0]} ran {len(forwards[0])} times in this step"
            )
        order = [name for name in self.capture.layer_names if name in names_of(stacks)]
        traces = []
        for of_stacks in zip(*forwards, strict=True):
            shape, masks = self._agreed(listener, stacks, of_stacks, batch, given)
            joined = {name: reading for forward in of_stacks for name, reading in forward.items()}
            traces.append(self.capture.make_trace({name: joined[name] for name in order}, shape, *masks))
        if listener.layers is None:
            self._say_what_is_together(stacks)
        return join(traces)

    def _choose(self, listener: "Listener") -> tuple[Stack, ...]:
        if listener.layers is not None:
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

    def _agreed(
        self,
        listener: "Listener",
        stacks: Sequence[Stack],
        forwards: Sequence[Forward],
        batch: Any,
        given: Mapping[str, Any],
    ) -> tuple[Shape, Masks]:
        """Return the shape and the masks of the tokens that all stacks saw in a forward."""
        if listener.masks is not None:
            masks = listener.masks(batch)
            shapes = [
                shape_of(forward, None if masks[0] is None else token_shape({"seq_idx": masks[0]}))
                for forward in forwards
            ]
            if len(set(shapes)) > 1:
                raise self._refusal(stacks, [f"{list(shape)} tokens" for shape in shapes])
            return shapes[0], masks
        shapes = [shape_of(forward, token_shape(given) if has_tokens(given) else None) for forward in forwards]
        if len(set(shapes)) > 1:
            raise self._refusal(stacks, [f"{list(shape)} tokens" for shape in shapes])
        told = [_told(forward, given) for forward in forwards]
        described = {tuple(id(one[name]) for name in DESCRIBES_TOKENS if name in one) for one in told}
        if len(described) > 1:
            raise self._refusal(
                stacks, [f"{[name for name in DESCRIBES_TOKENS if name in one] or 'no masks'}" for one in told]
            )
        self._say_what_is_unknown(stacks[0], told[0], batch, forwards[0])
        valid, document_ids = read_masks(told[0], shapes[0], self._pad_id(forwards[0]))
        if listener.tokens == "labels":
            labelled = labelled_tokens(told[0], shapes[0])
            valid = labelled if valid is None else valid & labelled
        return shapes[0], (valid, document_ids)

    def _refusal(self, stacks: Sequence[Stack], found: Sequence[str]) -> ValueError:
        each = "; ".join(f"{stack}: {what}" for stack, what in zip(stacks, found, strict=True))
        return ValueError(
            f"the routers that are trained saw different tokens ({each}): choose one stack with layers=, a regular "
            f"expression on the routers' names such as layers={'^' + re.escape(stacks[0].path)!r}, and take one more "
            "for each other stack"
        )

    def _say_what_is_together(self, stacks: Sequence[Stack]) -> None:
        """Warn once that several models are taken for one."""
        apart = {stack.caller or stack.path.partition(".")[0] for stack in stacks}
        if len(apart) > 1:
            self._say(
                f"the routing of {len(stacks)} stacks is taken together: {', '.join(map(str, stacks))}. Choose with "
                "layers=, a regular expression on the routers' names, if that is not meant"
            )

    def _say_what_is_unknown(self, stack: Stack, told: Mapping[str, Any], batch: Any, forward: Forward) -> None:
        """Warn once where something hints at pads or boundaries that are not known."""
        boundaries, pads = unread_hints(
            told, given_by(batch), inner_batches(batch), encoder_decoder=_of_encoder_decoder(forward)
        )
        if pads:
            self._say(
                f"{sorted({*boundaries, *pads})} of the batch may tell which tokens of {stack} are pads or where "
                "documents begin, but this is not read: all tokens count, each row as one document. Give the model an "
                "attention_mask, document_ids or position_ids, or give masks="
            )
        elif boundaries:
            self._say(
                f"{boundaries} of the batch may tell where documents begin in the rows of {stack}, but this is not "
                "read: each row counts as one document. Give the model document_ids or position_ids of its tokens, or "
                "give masks="
            )
        if pads or any(told.get(name) is not None for name in DESCRIBES_TOKENS):
            return
        if self._looks_left or not forward[stack.names[0]].logits.is_cuda:
            self._looks_left = max(0, self._looks_left - 1)
            if looks_padded(told, self._pad_id(forward)):
                self._say(
                    f"rows of input_ids begin or end with the pad token {self._pad_id(forward)} but there is no "
                    "attention_mask: these tokens count as real. Give the model an attention_mask, or give masks="
                )

    def _pad_id(self, forward: Forward) -> int | None:
        """Return the id of pads, as the configuration of the model around the routers tells it."""
        call = next(iter(forward.values())).call
        while call is not None:
            config = getattr(self.module.get_submodule(call.caller), "config", None)
            pad_id = getattr(config, "pad_token_id", None)
            if isinstance(pad_id, int):
                return pad_id
            call = call.outer
        return None

    def _say(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            warnings.warn(message, stacklevel=2)


class Listener:
    """Who takes part in a :class:`RoutingSession`: what it wants to hear, and what was heard.

    Attributes:
        session: what it takes part in.
        layers: regular expression on the routers' names, or None.
        expects: whether it will still ask for the trace of the last forward.
    """

    def __init__(
        self,
        session: RoutingSession,
        layers: str | None,
        adapters: tuple[RouterAdapter, ...],
        masks: Callable[[Any], Masks] | None,
        tokens: Which,
        keep_inputs: bool,
    ) -> None:
        self.session = session
        self.layers = layers
        self.adapters = adapters
        self.masks = masks
        self.tokens = tokens
        self.keep_inputs = keep_inputs
        self.expects = False

    def hears(self, name: str) -> bool:
        """Return whether a router of this name is one of its own."""
        return self.layers is None or re.search(self.layers, name) is not None

    @property
    def layer_names(self) -> tuple[str, ...]:
        """The names of the routers that it may hear."""
        return tuple(name for name in self.session.capture.layer_names if self.hears(name))

    @property
    def heard(self) -> bool:
        """Whether one of its routers ran in the last forward."""
        return any(self.session.capture.readings(name) for name in self.layer_names)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what runs inside as one step, and keep it until :meth:`done`."""
        self.expect()
        with self.session.capture.recording():
            yield

    def expect(self) -> None:
        """Say that the trace of the forward that comes will be asked for: it is kept until :meth:`done`."""
        self.expects = True

    def done(self) -> None:
        """Say that the trace is not needed any more: when nobody needs it, its tensors are free."""
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

    def any_router_learns(self) -> bool:
        """Return whether a parameter of a router is trained."""
        return self.session.capture.any_router_learns(self.layer_names)

    def frozen_routers(self) -> dict[str, FrozenRouter]:
        """Return copies of the routers as they are now, by name."""
        return self.session.capture.frozen_routers(self.layer_names)

    def release(self) -> None:
        """Leave; the last one gives the module back as it was."""
        self.session._leave(self)


def _told(forward: Forward, batch: Mapping[str, Any]) -> dict[str, Any]:
    name, reading = next(((name, one) for name, one in forward.items() if one.call is not None), (None, None))
    if name is None or reading is None:
        return dict(batch)
    return told_of(name, reading.call, batch)


def _of_encoder_decoder(forward: Forward) -> bool:
    call = next(iter(forward.values())).call
    while call is not None and not call.encoder_decoder:
        call = call.outer
    return call is not None


def _first_tensor(batch: Any) -> Tensor | None:
    """Return the first tensor in a batch, by which the same batch is known in another container."""
    if isinstance(batch, Tensor):
        return batch
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    return next((found for part in parts if (found := _first_tensor(part)) is not None), None)


def _same(kept: Sequence[Reading], now: Sequence[Reading]) -> bool:
    return len(kept) == len(now) and all(one is other for one, other in zip(kept, now, strict=True))
