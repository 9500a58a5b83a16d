"""Group routers that see the same tokens into stacks, and find the stacks that are trained."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from consistency_reg.capture.calls import find_callers
from consistency_reg.capture.readings import Forward, learns
from consistency_reg.capture.recording import RouterCapture


@dataclass(frozen=True)
class Stack:
    """Holds the routers of a list of layers, such as an encoder's.

    Attributes:
        caller: the innermost module around them that is given tokens by name; "" where none is.
        path: the module that holds the layers.
        names: the routers.
    """

    caller: str
    path: str
    names: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.path or 'the model'} ({len(self.names)} routers, {self.names[0]!r} the first)"


def stacks_of(capture: RouterCapture) -> list[Stack]:
    """Return the stacks of a model, in its order.

    Example:
        >>> class ToyTopKRouter(nn.Linear):
        ...     pass
        >>> teacher, student = (nn.Sequential(nn.ModuleDict({"gate": ToyTopKRouter(4, 4)})) for _ in range(2))
        >>> capture = RouterCapture(nn.ModuleDict({"teacher": teacher, "student": student}))
        >>> [stack.path for stack in stacks_of(capture)]
        ['teacher', 'student']
    """
    routers = capture.found
    callers = [caller.name for caller in find_callers(capture.model, routers) if caller.takes_tokens]
    stacks: dict[tuple[str, str], list[str]] = {}
    for router in routers:
        around = [name for name in callers if name == "" or router.name.startswith(f"{name}.")]
        caller = max(around, key=len, default="")
        stacks.setdefault((caller, _path(router.block_name, caller)), []).append(router.name)
    return [Stack(caller, path, tuple(names)) for (caller, path), names in stacks.items()]


def _path(block: str, caller: str) -> str:
    """Return the module that holds the layers of a block: what comes before the first number below the caller."""
    within = block.removeprefix(caller).strip(".").split(".")
    number = next((index for index, part in enumerate(within) if part.isdigit()), len(within) - 1)
    return ".".join(filter(None, [caller, *within[:number]]))


def trained_stacks(
    capture: RouterCapture, stacks: Sequence[Stack], parameters: Collection[int] | None
) -> tuple[Stack, ...]:
    """Return the stacks that ran and are trained.

    These are the stacks that ran with gradient, or all that ran if none did; among them those with parameters that are
    trained, if any has some.

    Args:
        capture: what listened.
        stacks: to choose from.
        parameters: ids of the parameters that the optimizers hold; those that require a gradient when None.
    """
    ran = [stack for stack in stacks if any(capture.readings(name) for name in stack.names)]
    learning = [
        stack for stack in ran if any(learns({name: one}) for name in stack.names for one in capture.readings(name))
    ]
    found = learning or ran
    belonging = [stack for stack in found if _is_trained(capture.model.get_submodule(stack.path), parameters)]
    if parameters is not None and not belonging:  # sharded optimizers hold other tensors
        belonging = [stack for stack in found if _is_trained(capture.model.get_submodule(stack.path), None)]
    return tuple(belonging or found)


def _is_trained(module: nn.Module, parameters: Collection[int] | None) -> bool:
    learning = (parameter for parameter in module.parameters() if parameter.requires_grad)
    return any(parameters is None or id(parameter) in parameters for parameter in learning)


def counted_forwards(capture: RouterCapture, names: Sequence[str]) -> list[Forward]:
    """Return the forwards of a recording that count: those with gradient, if there are any.

    Raises:
        RuntimeError: a router did not run, or not once in each forward.
    """
    forwards = capture.forwards(names)
    return [forward for forward in forwards if learns(forward)] or forwards


def names_of(stacks: Iterable[Stack]) -> set[str]:
    """Return the routers of stacks."""
    return {name for stack in stacks for name in stack.names}
