"""The base of every routing loss: a value for each layer, averaged over the layers."""

from dataclasses import replace
from inspect import signature

import torch
from torch import Tensor, nn

from consistency_reg.routing import LayerRouting, RoutingTrace


class RoutingLoss(nn.Module):
    """Computes a scalar of a :class:`~consistency_reg.RoutingTrace`, with its graph; the caller applies the weight.

    A subclass writes :meth:`layer_loss`, or :meth:`per_layer` where layers of one shape are worked on together. They
    are never pooled before that: a mean over layers hides what each of them does.
    """

    def layer_loss(self, layer: LayerRouting, trace: RoutingTrace) -> Tensor:
        """Return the loss of one layer, a scalar."""
        raise NotImplementedError

    def per_layer(self, trace: RoutingTrace) -> Tensor:
        """Return the loss of every layer [L], graph kept."""
        return torch.stack([self.layer_loss(layer, trace) for layer in trace])

    def forward(self, trace: RoutingTrace) -> Tensor:
        """Return the mean over the layers."""
        return self.per_layer(trace).mean()

    def extra_repr(self) -> str:
        """Return the options that the loss keeps under the names of its constructor's arguments, for printing."""
        kept = {name: getattr(self, name) for name in signature(type(self)).parameters if hasattr(self, name)}
        return ", ".join(f"{name}={value!r}" for name, value in kept.items() if not isinstance(value, nn.Module))


def without_padding(layer: LayerRouting, trace: RoutingTrace) -> LayerRouting:
    """Return the layer with the logits of padding blanked: whatever stands there, NaN included, has no effect."""
    if trace.valid is None or layer.logits is None:
        return layer
    return replace(layer, logits=layer.logits.masked_fill(~trace.valid[:, :, None], 0))
