"""Choose which routers and which tokens of a module a listener hears."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from consistency_reg.capture import RouterAdapter
from consistency_reg.masks import Masks

Which = Literal["all", "labels"]


@dataclass(frozen=True)
class ListenOptions:
    """Choose the routers and the tokens that a listener of a module hears.

    Args:
        masks: ``batch -> (valid, document_ids)``, in place of what is read.
        adapters: kinds of routers that the capture does not know by itself.
        layers: regular expression on the routers' names; those that the training is about when None.
        tokens: "labels" for those that have a label alone.
        keep_inputs: keep the routers' inputs too.

    Raises:
        ValueError: ``tokens`` is neither "all" nor "labels".

    Example:
        >>> ListenOptions(tokens="some")
        Traceback (most recent call last):
        ValueError: tokens must be 'all' or 'labels', got 'some'
    """

    masks: Callable[[Any], Masks] | None = None
    adapters: Sequence[RouterAdapter] = ()
    layers: str | None = None
    tokens: Which = "all"
    keep_inputs: bool = False

    def __post_init__(self) -> None:
        if self.tokens not in ("all", "labels"):
            raise ValueError(f"tokens must be 'all' or 'labels', got {self.tokens!r}")
