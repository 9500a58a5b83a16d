"""Reading and changing what a model returns: its loss, and every tensor that can be trained."""

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor


def change_loss(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return the output with ``change(loss)`` for its loss.

    The loss is ``output.loss`` or ``output["loss"]``, the first of a tuple (``return_dict=False``), or the output
    itself. An output that can be written to is changed in place.

    Raises:
        LookupError: there is no loss, a scalar tensor, in it.

    Example:
        >>> import torch
        >>> change_loss({"loss": torch.tensor(1.0), "logits": None}, lambda loss: loss + 1)
        {'loss': tensor(2.), 'logits': None}
    """
    loss = loss_of(output)
    if loss is None:
        raise LookupError
    if isinstance(output, tuple):
        return (change(loss), *output[1:])
    if isinstance(output, Tensor):
        return change(loss)
    if isinstance(output, MutableMapping):  # transformers' outputs too
        output["loss"] = change(loss)
    else:
        output.loss = change(loss)
    return output


def loss_of(output: Any) -> Tensor | None:
    """Return the loss, a scalar, in what a model returned; None where there is none.

    Example:
        >>> import torch
        >>> loss_of({"loss": torch.tensor(1.0)}), loss_of({"logits": torch.ones(2, 3)})
        (tensor(1.), None)
    """
    if isinstance(output, tuple):
        loss = output[0] if output else None
    elif isinstance(output, Mapping):
        loss = output.get("loss")
    else:
        loss = output if isinstance(output, Tensor) else getattr(output, "loss", None)
    return loss if isinstance(loss, Tensor) and not loss.dim() else None


def trained_tensors(output: Any) -> list[Tensor]:
    """Return the tensors of an output through which a backward pass can go, each one once, in its order.

    Looks into mappings, lists, tuples and the attributes of any other object, but not into caches of keys and values.

    Example:
        >>> import torch
        >>> hidden = torch.ones(2, requires_grad=True) * 3
        >>> len(trained_tensors({"logits": hidden * 2, "hidden_states": (hidden, hidden), "ids": torch.tensor([1])}))
        2
    """
    found = {id(tensor): tensor for tensor in _tensors(output) if tensor.grad_fn is not None}
    return list(found.values())


def change_tensors(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return the output with ``change(tensor)`` for its tensors; mappings and objects are changed in place.

    Example:
        >>> import torch
        >>> change_tensors({"loss": torch.tensor(1.0), "states": (torch.tensor(2.0), "name")}, torch.neg)
        {'loss': tensor(-1.), 'states': (tensor(-2.), 'name')}
    """
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, MutableMapping):
        for name, value in list(output.items()):
            output[name] = change_tensors(value, change)
        return output
    if isinstance(output, tuple):
        changed = [change_tensors(value, change) for value in output]
        return type(output)(*changed) if hasattr(output, "_fields") else tuple(changed)
    if isinstance(output, list):
        return [change_tensors(value, change) for value in output]
    for name, value in _attributes(output).items():
        setattr(output, name, change_tensors(value, change))
    return output


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
        return
    if isinstance(output, Mapping):
        parts = list(output.values())
    elif isinstance(output, tuple | list):
        parts = list(output)
    else:
        parts = list(_attributes(output).values())
    for part in parts:
        yield from _tensors(part)


def _attributes(output: Any) -> dict[str, Any]:
    """Return the attributes of an object that a model may return; none of a cache, which is no output to be trained."""
    if hasattr(output, "get_seq_length") or isinstance(output, type):
        return {}
    return dict(getattr(output, "__dict__", {}))
