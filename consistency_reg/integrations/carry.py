"""Let a term's gradient join each backward pass through an output, without the term being in anybody's loss."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.autograd import Function

from consistency_reg.integrations.outputs import change_tensors, trained_tensors


def carry(output: Any, weighted: Tensor, scale: Callable[[Tensor], Tensor]) -> Any:
    """Return the output as it is, whose backward pass adds ``scale(1) * d weighted``, whatever is trained of it.

    One autograd node has every tensor of the output that can be trained for its input and its output, and the term for
    one more input. A backward pass through any of them runs it once: the gradients that arrive go on unchanged, and
    the term gets a gradient of its own, which does not depend on them. So a loss that is scaled by a reward, masked,
    clipped or built from the log-probabilities leaves the term as it is.

    Args:
        output: what a model returned; mappings and objects are changed in place. Scalars may be changed in place
            afterwards, larger tensors not, as they are views of what the model computed.
        weighted: scalar, the weighted term with its graph.
        scale: ``1 (as a scalar of the term's type and device) -> what the term's gradient is multiplied by``; called
            in the backward pass.

    Raises:
        LookupError: nothing of the output can be trained.

    Example:
        >>> import torch
        >>> x, term = torch.tensor(2.0, requires_grad=True), torch.tensor(5.0, requires_grad=True)
        >>> output = carry({"logits": x * torch.ones(3)}, term, lambda one: one / 4)
        >>> (-60 * output["logits"].sum()).backward()
        >>> x.grad, term.grad
        (tensor(-180.), tensor(0.2500))
    """
    tensors = trained_tensors(output)
    if not tensors:
        raise LookupError
    carried = _Carry.apply(scale, weighted, *tensors)
    by_id = {id(tensor): new for tensor, new in zip(tensors, carried, strict=True)}
    return change_tensors(output, lambda tensor: by_id.get(id(tensor), tensor))


class _Carry(Function):
    @staticmethod
    def forward(ctx: Any, scale: Callable[[Tensor], Tensor], weighted: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.scale = scale
        ctx.like = weighted.new_ones(())
        return tuple(tensor.view_as(tensor) if tensor.dim() else tensor.clone() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        return None, ctx.scale(ctx.like), *gradients


def watch(output: Any, loss: Tensor, refuse: Callable[[], None]) -> None:
    """Call ``refuse()`` in a backward pass that goes through an output without its ``loss``.

    Args:
        output: what a model returned.
        loss: scalar, its loss.
        refuse: raises.

    Example:
        >>> import torch
        >>> x = torch.tensor(2.0, requires_grad=True)
        >>> output = {"loss": x * 3, "logits": x * torch.ones(3)}
        >>> watch(output, output["loss"], lambda: print("the loss is not trained"))
        >>> output["logits"].sum().backward()
        the loss is not trained
    """
    heard: list[bool] = []

    def note(_: Tensor) -> None:
        heard.append(True)

    def check(_: Tensor) -> None:
        if not heard:
            refuse()

    loss.register_hook(note)
    for tensor in trained_tensors(output):
        if tensor is not loss:
            tensor.register_hook(check)
