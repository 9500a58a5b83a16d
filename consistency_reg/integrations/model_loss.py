"""Add a term to the loss that a model returns, and refuse where what is done to that loss has no constant scale."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from consistency_reg.integrations.carry import watch
from consistency_reg.integrations.outputs import change_loss

ELSEWHERE = (
    "in transformers' and TRL's trainers use ConsistencyCallback(...).add_to(trainer), in Lightning "
    "ConsistencyRegularizer; in a loop of your own attach(..., scale=1 / micro-batches of an optimizer step)"
)


class Factors:
    """Check the factors that a model's loss is trained with, which are those of its term too.

    A factor is known to be the loss' own where it is a constant above 0, up to the powers of two of a gradient scaler
    and to the few micro-batches of an epoch's last step. A reward or a share of tokens is none.

    Example:
        >>> factors = Factors()
        >>> for factor in (0.25, 0.25, 1 / 3, 8.0):
        ...     factors.check(torch.tensor(factor))
        >>> factors.check(torch.tensor(-0.7))
        Traceback (most recent call last):
        ...
        RuntimeError: the model's loss was multiplied by -0.7, and by 0.25 before: ...
    """

    LARGEST = 64  # micro-batches of a step, but for powers of two
    EXACT = 1e-4  # a number type that is coarser cannot tell one factor from another

    def __init__(self) -> None:
        self._first: float | None = None

    def check(self, factor: Tensor) -> None:
        """Compare the gradient that arrived at a loss with those before.

        Raises:
            RuntimeError: it is not above 0, or not a simple multiple of the first.
        """
        value = float(factor)
        if not math.isfinite(value):  # a gradient scaler will leave this step out
            return
        tolerance = 4 * torch.finfo(factor.dtype).eps
        first = value if self._first is None else self._first
        if value <= 0 or (tolerance < self.EXACT and not _is_simple(value / first, self.LARGEST, tolerance)):
            before = "" if self._first is None else f", and by {self._first:.6g} before"
            raise RuntimeError(
                f"the model's loss was multiplied by {value:.6g}{before}: the consistency term that is attached to it "
                "would be too, and that is right for a constant above 0 alone, not for a reward or a share of tokens. "
                f"Instead, {ELSEWHERE}"
            )
        self._first = first


def add_to_loss(output: Any, weighted: Tensor, factors: Factors, given: Mapping[str, Any], kind: str) -> Any:
    """Return a model's output with ``loss + weighted`` for its loss, which refuses to be trained without it.

    Args:
        output: what the model returned.
        weighted: scalar, the weighted term with its graph.
        factors: those of the backward passes before.
        given: the arguments of the forward by name.
        kind: the model's class, for messages.

    Raises:
        RuntimeError: there is no loss; ``num_items_in_batch`` was given. In the backward pass: something else than the
            loss is trained, or the loss with a factor that is no constant.
    """
    if "num_items_in_batch" in given:
        raise RuntimeError(
            f"{kind} was given num_items_in_batch, so the losses of micro-batches are added up and none says how many "
            f"there are, which the consistency term is to be divided by: {ELSEWHERE}"
        )
    joined: list[Tensor] = []

    def join(loss: Tensor) -> Tensor:
        joined.append(loss + weighted.to(loss))
        return joined[0]

    try:
        output = change_loss(output, join)
    except LookupError:
        raise RuntimeError(
            f"{kind} returned no loss in training that the consistency term could be added to: give it labels (it was "
            f"given {sorted(given)}). Where the loss is computed outside of the model, {ELSEWHERE}"
        ) from None
    joined[0].register_hook(factors.check)
    watch(output, joined[0], _refuse)
    return output


def _refuse() -> None:
    raise RuntimeError(
        "the consistency term is in the loss that the model returned, but something else of what it returned is "
        "trained (logits or log-probabilities, as in policy, preference and reward losses), whose scale cannot be "
        f"told: {ELSEWHERE}"
    )


def _is_simple(ratio: float, largest: int, tolerance: float) -> bool:
    """Return whether a ratio is p / q times a power of two, with p and q up to ``largest``."""
    mantissa = math.frexp(ratio)[0]
    return any(abs(mantissa * q - round(mantissa * q)) <= tolerance * q * mantissa for q in range(1, largest + 1))
