"""Add a weighted routing term to the loss that ``training_step`` returns, for all callbacks with such a term."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from consistency_reg.callbacks.listening import ListeningCallback
from consistency_reg.callbacks.trainer_state import callbacks_of
from consistency_reg.optional import require
from consistency_reg.routing import RoutingTrace
from consistency_reg.session import Listener, ListenOptions
from consistency_reg.term import Term

with require("lightning"):
    from lightning.pytorch import Callback, LightningModule, Trainer


class TrainingStepTerm(ListeningCallback):
    """Adds a term of the routing of ``training_step`` to the loss that it returns; the module stays as it is.

    A subclass says what the term is (:meth:`term`). Any number of them may stand in one trainer: the term is logged as
    ``train/NAME/...``, with a number behind a name that stands before it already.

    Args:
        options: the routers and tokens that the term is about.
        name: of the term, in the log and in checkpoints; that of the class when None.
    """

    name: str  # in the log
    by_hand: str  # what to do in a training_step whose loss is not the returned one

    def __init__(self, options: ListenOptions, name: str | None = None) -> None:
        super().__init__(options)
        if name is not None:
            self.name = name
        self.logged_name = self.name
        self._wraps = False

    def term(self, step: int, trace: RoutingTrace) -> Term:
        """Return the term of one forward at an optimizer step."""
        raise NotImplementedError

    def logged_beside(self) -> dict[str, float]:
        """Return what is logged next to the term itself."""
        return {}

    def is_on(self) -> bool:
        """Return whether there is a term at all."""
        return True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wrap ``training_step``, so that whoever trains before ``on_fit_start`` has the term too."""
        if stage != "fit" or not self.is_on():
            return
        terms = callbacks_of(trainer, TrainingStepTerm)
        earlier = [term.name for term in terms[: terms.index(self)]] if self in terms else []
        same = earlier.count(self.name)
        self.logged_name = f"{self.name}_{same + 1}" if same else self.name
        self._wraps = True
        pl_module.training_step = _StepWithTerm(self, trainer, pl_module)  # type: ignore[method-assign]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the routers, before the first forward, so that compiled models are heard too."""
        if self._wraps:
            self.listener(trainer, pl_module)

    def after_term(self, trainer: Trainer, term: Term, trace: RoutingTrace) -> None:
        """Look at the term of one forward before it is added to the loss."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore ``training_step``."""
        self._release(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore ``training_step`` where training did not begin."""
        if stage == "fit":
            self._release(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore ``training_step``."""
        self._release(pl_module)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take the state of a callback of this kind that no other takes, as options in its key may have changed."""
        states = checkpoint.get("callbacks") or {}
        kind = type(self).__qualname__
        claimed = {callback.state_key for callback in callbacks_of(trainer, Callback)}
        free = [key for key in states if key not in claimed and (key == kind or str(key).startswith(kind + "{"))]
        if self.state_key not in states and len(free) == 1:
            states[self.state_key] = states.pop(free[0])

    def listener(self, trainer: Trainer, pl_module: LightningModule) -> Listener:
        """Return what listens to the module until ``fit`` ends."""
        if self._listener is None:
            if not pl_module.automatic_optimization:
                raise RuntimeError(
                    f"{type(self).__name__} adds its term to the loss that training_step returns, but "
                    f"{type(pl_module).__name__} uses manual optimization: {self.by_hand} in training_step instead"
                )
            self.on_listen(self.listen(trainer, pl_module), pl_module)
        return self.listen(trainer, pl_module)

    def on_listen(self, listener: Listener, pl_module: LightningModule) -> None:
        """Look at the routers before the first step."""

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
        pl_module.log_dict({f"train/{self.logged_name}/{name}": value for name, value in logged.items()})
        return output + term.weighted.to(output.dtype)

    def _release(self, pl_module: LightningModule) -> None:
        self.release()
        if self._wraps:
            self._wraps = False
            _unwrap(pl_module)


class _StepWithTerm:
    """Call the ``training_step`` of a module with a callback's term; a copy or a pickle of the module is without it."""

    def __init__(self, owner: TrainingStepTerm, trainer: Trainer, pl_module: LightningModule) -> None:
        self.shadowed = vars(pl_module).get("training_step")
        self.owner, self.trainer, self.module, self.step = owner, trainer, pl_module, pl_module.training_step
        functools.update_wrapper(self, inspect.unwrap(self.step), updated=())  # Lightning looks one level down

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        listener = self.owner.listener(self.trainer, self.module)
        try:
            with listener.recording():
                output = self.step(*args, **kwargs)
            if output is None:
                return None
            batch = args[0] if args else next(iter(kwargs.values()), None)
            return self.owner._add(self.trainer, self.module, output, listener.trace(batch))
        finally:
            listener.done()

    def __reduce__(self) -> Any:
        if self.shadowed is not None:
            return _same, (self.shadowed,)
        return getattr, (self.module, "training_step")  # of its class: the copy has nothing of its own yet


def _same(step: Callable[..., Any]) -> Callable[..., Any]:
    return step


def _unwrap(pl_module: LightningModule) -> None:
    """Take off the terms whose callbacks have let go, from the outermost on; what they lay over comes back."""
    own = vars(pl_module)
    while isinstance(outermost := own.get("training_step"), _StepWithTerm) and not outermost.owner._wraps:
        del own["training_step"]
        if outermost.shadowed is not None:
            own["training_step"] = outermost.shadowed
