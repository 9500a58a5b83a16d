"""A weighted routing term in the loss that ``training_step`` returns: what the callbacks with such a term share."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from consistency_reg.capture import RouterAdapter, RouterCapture
from consistency_reg.masks import Masks, batch_masks
from consistency_reg.optional import require
from consistency_reg.routing import RoutingTrace
from consistency_reg.term import Term

with require("lightning"):
    from lightning.pytorch import Callback, LightningModule, Trainer


class TrainingStepTerm(Callback):
    """Adds a term of the routing of ``training_step`` to the loss that it returns; the module stays as it is.

    A subclass says what the term is (:meth:`term`) and wraps the module when ``fit`` starts (:meth:`_wrap`). The term
    is logged as ``train/NAME/...``.

    Args:
        masks: ``batch -> (valid, document_ids)``, each [B, T] or None; reads the usual keys of a mapping when None.
        adapters: kinds of routers that the capture does not know by itself.
    """

    name: str  # in the log
    by_hand: str  # what to do in a training_step whose loss is not the returned one

    def __init__(self, masks: Callable[[Any], Masks] | None = None, adapters: Sequence[RouterAdapter] = ()) -> None:
        self.masks = masks or batch_masks
        self.adapters = tuple(adapters)
        self._capture: RouterCapture | None = None

    def term(self, step: int, trace: RoutingTrace) -> Term:
        """The term of one forward at an optimizer step."""
        raise NotImplementedError

    def logged_beside(self) -> dict[str, float]:
        """What is logged beside the term itself."""
        return {}

    def after_term(self, trainer: Trainer, term: Term, trace: RoutingTrace) -> None:
        """Look at the term of one forward before it is added to the loss."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give ``training_step`` back."""
        self._release(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give ``training_step`` back."""
        self._release(pl_module)

    def _wrap(self, trainer: Trainer, pl_module: LightningModule, *, keep_inputs: bool = False) -> RouterCapture:
        """Find the routers and wrap ``training_step``, until ``fit`` ends; the capture that listens."""
        if not pl_module.automatic_optimization:
            raise RuntimeError(
                f"{type(self).__name__} adds its term to the loss that training_step returns, but "
                f"{type(pl_module).__name__} uses manual optimization: {self.by_hand} in training_step instead"
            )
        capture = self._capture = RouterCapture(pl_module, self.adapters, keep_inputs=keep_inputs).attach()
        pl_module.training_step = _StepWithTerm(self, trainer, pl_module)  # type: ignore[method-assign]
        return capture

    def _add(self, trainer: Trainer, pl_module: LightningModule, output: Any, trace: RoutingTrace) -> Any:
        if isinstance(output, Mapping):
            if not isinstance(output.get("loss"), Tensor):
                raise RuntimeError(f"training_step must return its loss under the key 'loss', got keys {list(output)}")
            return {**output, "loss": self._add(trainer, pl_module, output["loss"], trace)}
        if not isinstance(output, Tensor):
            raise RuntimeError(f"training_step must return its loss, got {type(output).__name__}")
        term = self.term(trainer.global_step, trace)
        self.after_term(trainer, term, trace)
        logged = term.logged() | self.logged_beside()
        pl_module.log_dict({f"train/{self.name}/{name}": value for name, value in logged.items()})
        return output + term.weighted.to(output.dtype)

    def _release(self, pl_module: LightningModule) -> None:
        if self._capture is None:
            return
        self._capture.detach()
        self._capture = None
        _unwrap(pl_module)


class _StepWithTerm:
    """The ``training_step`` of a module, with a callback's term; in a copy or a pickle of the module it is without."""

    def __init__(self, owner: TrainingStepTerm, trainer: Trainer, pl_module: LightningModule) -> None:
        self.shadowed = vars(pl_module).get("training_step")
        self.owner, self.trainer, self.module, self.step = owner, trainer, pl_module, pl_module.training_step
        functools.update_wrapper(self, inspect.unwrap(self.step), updated=())  # Lightning looks one level down

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        capture = self.owner._capture
        assert capture is not None
        with capture.recording():
            output = self.step(*args, **kwargs)
        if output is None:
            return None
        trace = capture.trace(*self.owner.masks(args[0] if args else None))
        capture.clear()
        return self.owner._add(self.trainer, self.module, output, trace)

    def __reduce__(self) -> Any:
        if self.shadowed is not None:
            return _same, (self.shadowed,)
        return getattr, (self.module, "training_step")  # of its class: the copy has nothing of its own yet


def _same(step: Callable[..., Any]) -> Callable[..., Any]:
    return step


def _unwrap(pl_module: LightningModule) -> None:
    """Take off the terms whose callbacks have let go, from the outermost on; what they lay over comes back."""
    own = vars(pl_module)
    while isinstance(outermost := own.get("training_step"), _StepWithTerm) and outermost.owner._capture is None:
        del own["training_step"]
        if outermost.shadowed is not None:
            own["training_step"] = outermost.shadowed
