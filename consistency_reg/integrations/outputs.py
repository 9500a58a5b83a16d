"""Where a model's output holds its loss, and how a term is added to it."""

from collections.abc import Callable, MutableMapping
from typing import Any

from torch import Tensor


def change_loss(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The output with ``change(loss)`` for its loss.

    The loss is ``output.loss`` or ``output["loss"]``, the first of a tuple (``return_dict=False``), or the output
    itself. An output that can be written to is changed in place.

    Raises:
        LookupError: there is no loss, a scalar tensor, in it.

    Example:
        >>> import torch
        >>> change_loss({"loss": torch.tensor(1.0), "logits": None}, lambda loss: loss + 1)
        {'loss': tensor(2.), 'logits': None}
    """
    if isinstance(output, tuple):
        return (change(_scalar(output[0] if output else None)), *output[1:])
    if isinstance(output, MutableMapping):  # transformers' outputs too
        output["loss"] = change(_scalar(output.get("loss")))
        return output
    if isinstance(output, Tensor):
        return change(_scalar(output))
    output.loss = change(_scalar(getattr(output, "loss", None)))
    return output


def _scalar(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.dim() > 0:
        raise LookupError
    return loss
