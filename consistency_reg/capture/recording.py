"""Record what routers decide during a forward pass."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from consistency_reg.capture.adapters import RouterAdapter, check, describe, tensors_of
from consistency_reg.capture.calls import Call, Caller, find_callers
from consistency_reg.capture.finding import ByShape, Router, find_routers, how_to_register, is_ids
from consistency_reg.capture.frozen import FrozenRouter
from consistency_reg.capture.hooks import OwnedHook
from consistency_reg.capture.known import DEFAULT_ADAPTERS
from consistency_reg.capture.readings import Forward, Reading, by_forward, shape_of, warn_of_lost_graphs
from consistency_reg.capture.traces import check_selection, trace_of
from consistency_reg.masks import Shape
from consistency_reg.routing import RoutingTrace

CACHES = ("past_key_values", "cache_params")


class RouterCapture:
    """Listens to every router of a model; a context manager, or :meth:`attach` and :meth:`detach`.

    Each forward of the model replaces what the one before it left. Only a forward is recorded: when activation
    checkpointing runs layers again in the backward pass, that is not counted again. Nor are the steps of ``generate``,
    forwards without autograd that are given a cache, unless asked for. A copy or a pickle of the model does not carry
    the capture with it. Under ``torch.compile`` attach before the first compiled forward.

    A router of an unknown class is read by the shapes of what it returns and by the ids that the experts beside it
    are given, if these leave no doubt and it selects by its logits; else it is refused.

    Args:
        model: any module that contains routers.
        adapters: kinds of routers to look for, before the built-in ones.
        keep_inputs: also keep what each router was given (its hidden states, no graph), which an anchor to earlier
            routers needs.
        layers: regular expression; listen to the routers whose name matches it (``re.search``) alone. A trace has one
            [B, T], so an encoder and a decoder of different lengths, or a vision tower and a language model, need a
            capture each, ``RouterCapture(model, layers=r"^decoder")``.
        generation: record the steps of ``generate`` too; the last one is what :meth:`trace` gives.

    Raises:
        ValueError: the model has no router, or experts without a router that can be told; the message says what was
            found and how to make it known.

    Example:
        >>> class ToyTopKRouter(nn.Linear):
        ...     def forward(self, x):
        ...         logits = super().forward(x)
        ...         weights, ids = logits.softmax(-1).topk(2)
        ...         return logits, weights, ids
        >>> import torch
        >>> model = nn.Sequential(ToyTopKRouter(8, 4))
        >>> with RouterCapture(model) as capture:
        ...     _ = model(torch.randn(3, 5, 8))
        >>> capture.trace().layers[0].expert_ids.shape
        torch.Size([3, 5, 2])
    """

    def __init__(
        self,
        model: nn.Module,
        adapters: Sequence[RouterAdapter] = (),
        *,
        keep_inputs: bool = False,
        layers: str | None = None,
        generation: bool = False,
    ) -> None:
        self.model = model
        self.keep_inputs = keep_inputs
        self.generation = generation
        self.layers = layers
        self.adapters = tuple(adapters)
        self._routers = find_routers(model, (*adapters, *DEFAULT_ADAPTERS), layers)
        self._unchecked = {name for name, router in self._routers.items() if isinstance(router.adapter, ByShape)}
        self._handles: list[RemovableHandle] = []
        self._readings: dict[str, list[Reading]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._recordings = 0  # open blocks of recording()
        self._generating = 0  # open forwards of a generation
        self._in_forward = False
        self._grad_mode = False  # when the recording or the forward began
        self._calls: list[Call | None] = []  # open now, the innermost last; None is one that does not count

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Return the routers' names in the model, in its order."""
        return tuple(self._routers)

    @property
    def routers(self) -> dict[str, nn.Module]:
        """Return the router modules by name."""
        return {name: router.module for name, router in self._routers.items()}

    @property
    def found(self) -> tuple[Router, ...]:
        """Return the routers with their names and adapters, in the model's order."""
        return tuple(self._routers.values())

    @property
    def heard(self) -> bool:
        """Return whether a router ran in the last forward."""
        return any(self._readings.values())

    def any_router_learns(self, names: Collection[str] | None = None) -> bool:
        """Return whether a parameter of a router, or of what PEFT has put around it, is trained; all when None."""
        chosen = (router for name, router in self._routers.items() if names is None or name in names)
        modules = (self.model.get_submodule(router.outer_name) for router in chosen)
        return any(parameter.requires_grad for module in modules for parameter in module.parameters())

    def frozen_routers(self, names: Collection[str] | None = None) -> dict[str, FrozenRouter]:
        """Return copies of the routers as they are now, for :class:`~consistency_reg.losses.RouterAnchorLoss`."""
        return {
            name: FrozenRouter(router.module, router.adapter)
            for name, router in self._routers.items()
            if names is None or name in names
        }

    def attach(self) -> "RouterCapture":
        """Start to listen; without effect when attached already."""
        if self._handles:
            return self
        self._in_forward, self._generating = False, 0
        listen = self._handles.append
        for module in self.model.modules():
            if module is self.model or hasattr(module, "generate"):
                listen(module.register_forward_pre_hook(OwnedHook(self, "_enter_generation"), with_kwargs=True))
                listen(module.register_forward_hook(OwnedHook(self, "_leave_generation"), always_call=True))
        listen(self.model.register_forward_pre_hook(OwnedHook(self, "_begin_forward")))
        ends = {"always_call": True, "prepend": True}  # before those who ask for the trace, whenever they came
        listen(self.model.register_forward_hook(OwnedHook(self, "_end_forward"), **ends))
        for caller in find_callers(self.model, self._routers.values()):
            listen(caller.module.register_forward_pre_hook(OwnedHook(self, "_open_call", caller), with_kwargs=True))
            listen(caller.module.register_forward_hook(OwnedHook(self, "_close_call"), **ends))
        for name, router in self._routers.items():
            block = self.model.get_submodule(router.block_name)
            listen(block.register_forward_pre_hook(OwnedHook(self, "_see_block", name), with_kwargs=True))
            listen(router.module.register_forward_hook(OwnedHook(self, "_read", name), with_kwargs=True))
            if router.experts is not None:
                hook = OwnedHook(self, "_read_experts", name)
                listen(router.experts.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def detach(self) -> None:
        """Stop to listen and forget; without effect when not attached."""
        self._remove_hooks()
        self._readings.clear()

    def __enter__(self) -> "RouterCapture":
        return self.attach()

    def __exit__(self, *exception: object) -> None:
        self._remove_hooks()  # what was read stays for trace()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record all that runs inside as one forward, for callers that do not call ``model`` itself."""
        if not self._recordings:
            self._begin()
        self._recordings += 1
        try:
            yield
        finally:
            self._recordings -= 1

    def trace(self, valid: Tensor | None = None, document_ids: Tensor | None = None) -> RoutingTrace:
        """Return the routing of the last forward, graph kept where there was one.

        Args:
            valid: [B, T] bool, True for real tokens; all when None.
            document_ids: [B, T] integers; one document a row when None.

        Raises:
            RuntimeError: there was no forward, or a router ran not exactly once in it.
            ValueError: ``valid`` or ``document_ids`` of another shape than the batch; routers that ran on batches of
                different shapes; an unknown router that selects by something else than its logits.

        Warns:
            UserWarning: routers ran without autograd in a forward with it, as reentrant checkpointing does: a loss on
                this trace has no gradient there.
        """
        (forward,) = self.forwards(most=1)
        shape = shape_of(forward, (valid.shape[0], valid.shape[1]) if valid is not None and valid.dim() == 2 else None)
        return self.make_trace(forward, shape, valid, document_ids)

    def readings(self, name: str) -> tuple[Reading, ...]:
        """Return what a router decided since the last forward began, in order."""
        return tuple(self._readings.get(name, ()))

    def forwards(self, names: Sequence[str] | None = None, most: int | None = None) -> list[Forward]:
        """Return the readings of the routers by forward, where their model was called several times in a recording.

        Args:
            names: of the routers; all when None.
            most: how many forwards there may be.

        Raises:
            RuntimeError: a router did not run, or not once in each forward.
        """
        heard = {name: self.readings(name) for name in (self.layer_names if names is None else names)}
        return by_forward(heard, most, attached=bool(self._handles))

    def make_trace(
        self, forward: Forward, shape: Shape, valid: Tensor | None = None, document_ids: Tensor | None = None
    ) -> RoutingTrace:
        """Return the routing of a forward of [B, T] tokens; see :meth:`trace`."""
        warn_of_lost_graphs(forward, stacklevel=4)
        trace = trace_of(self._routers, forward, shape, valid, document_ids, with_inputs=self.keep_inputs)
        if self._unchecked:
            check_selection(trace, {name: self._routers[name] for name in self._unchecked})
            self._unchecked.clear()
        return trace

    def clear(self) -> None:
        """Forget the last forward, which frees its tensors."""
        self._readings.clear()

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _begin(self) -> None:
        self._readings.clear()
        self._shapes.clear()
        self._calls.clear()
        self._grad_mode = torch.is_grad_enabled()

    def _begin_forward(self, *_: Any) -> None:
        if self._generating:
            return
        if not self._recordings:
            self._begin()
        self._in_forward = True

    def _end_forward(self, *_: Any) -> None:
        self._in_forward = False

    def _enter_generation(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._generating or (not self.generation and _is_step_of_generation(args, kwargs)):
            self._generating += 1

    def _leave_generation(self, *_: Any) -> None:
        self._generating = max(0, self._generating - 1)

    def _open_call(self, caller: Caller, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = None
        if self._listening:
            outer = next((one for one in reversed(self._calls) if one is not None), None)
            begun = {name: len(self._readings.get(name, ())) for name in self._routers}
            given = caller.read(args, kwargs)
            call = Call(caller.name, given, torch.is_grad_enabled(), outer, caller.encoder_decoder, begun)
            if outer is not None and call.shape is not None:
                outer.has_inner = True
        self._calls.append(call)

    def _close_call(self, *_: Any) -> None:
        call = self._calls.pop() if self._calls else None
        if call is not None:
            for name, begun in call.begun.items():
                for reading in self._readings.get(name, [])[begun:]:
                    if reading.call is None:
                        reading.call = call

    @property
    def _listening(self) -> bool:
        return not self._generating and (self._in_forward or self._recordings > 0)

    def _see_block(self, name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._listening and isinstance(hidden := _first(args, kwargs), Tensor):
            self._shapes[name] = tuple(hidden.shape)

    def _read(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not self._listening:
            return
        hidden = _first(args, kwargs)
        hidden = hidden if isinstance(hidden, Tensor) else None
        if hidden is not None and hidden.dim() == 3:
            self._shapes[name] = tuple(hidden.shape)
        try:
            logits, expert_ids = self._routers[name].adapter.read(module, output)
        except TypeError as error:
            raise TypeError(f"{self._routers[name]} {error}{how_to_register(type(module).__name__)}") from None
        reading = Reading(
            logits,
            None if expert_ids is None else expert_ids.long(),
            given=(*args[1:], *kwargs.values()) if args else tuple(kwargs.values())[1:],
            inputs=hidden.detach() if self.keep_inputs and args and hidden is not None else None,
            shape=self._shapes.get(name, ()),
            grad=torch.is_grad_enabled(),
            began_with_grad=self._grad_mode,
        )
        self._readings.setdefault(name, []).append(reading)

    def _read_experts(self, name: str, experts: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read the ids that the experts are given, where the router does not return them."""
        readings = self._readings.get(name)
        if not self._listening or not readings or readings[-1].expert_ids is not None:
            return
        found = [tensor for tensor in (*tensors_of(args), *tensors_of(kwargs)) if is_ids(tensor)]
        try:
            if len(found) != 1:
                raise TypeError
            check(readings[-1].logits, found[0])
        except TypeError:
            raise TypeError(
                f"the experts beside {self._routers[name]} ({type(experts).__name__}) must be given one tensor of "
                f"expert ids [..., K] for logits {list(readings[-1].logits.shape)}, got {describe(args)} and "
                f"{sorted(kwargs)}.{how_to_register(type(self._routers[name].module).__name__)}"
            ) from None
        readings[-1].expert_ids = found[0].long()


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()), None)


def _is_step_of_generation(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether a forward continues a cache, or fills one that it was given, without autograd."""
    if torch.is_grad_enabled():
        return False  # tuned prefixes are given as a cache, too
    return any(kwargs.get(name) is not None for name in CACHES) or any(hasattr(arg, "get_seq_length") for arg in args)
