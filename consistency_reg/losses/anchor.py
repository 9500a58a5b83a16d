"""Keep a router that is fine-tuned close to what it was before."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from consistency_reg.functional.anchor import mean_kl
from consistency_reg.losses.base import RoutingLoss, without_padding
from consistency_reg.routing import LayerRouting, RoutingTrace


class RouterAnchorLoss(RoutingLoss):
    """Computes ``mean_t KL(p_t ‖ p_ref(h_t))`` in nats, p_ref being the earlier router on the *present* input h_t.

    The reference sees the same hidden state as the router does, so it moves with the context: only what the router
    itself learned is held back. No gradient goes to the reference, nor through it to h_t. The references are part of
    the state dict: a run that is resumed from a checkpoint keeps the routers that it started from.

    Args:
        references: for each layer's name a module that maps [N, H] router inputs to [N, E] logits, as
            ``RouterCapture(model, keep_inputs=True).frozen_routers()`` gives them.

    Raises:
        ValueError: no reference; in a call, a layer without one, or a trace without router inputs.

    Source: arXiv 2605.27081, the "trust" term of ReMoE.

    Example:
        >>> logits = torch.tensor([[[0.0, 0.0]]], requires_grad=True)
        >>> trace = RoutingTrace([torch.tensor([[[0]]])], 2, logits=[logits], inputs=[torch.tensor([[[1.0]]])])
        >>> reference = nn.Linear(1, 2, bias=False)
        >>> _ = nn.init.constant_(reference.weight, 3.0)
        >>> RouterAnchorLoss({"layer_00": reference})(trace).item()
        0.0
    """

    def __init__(self, references: Mapping[str, nn.Module]) -> None:
        super().__init__()
        if not references:
            raise ValueError("references must hold a frozen router for each layer, got none")
        self.layer_names = tuple(references)
        self.references = nn.ModuleList(references.values())  # a ModuleDict takes no names with dots

    def layer_loss(self, layer: LayerRouting, trace: RoutingTrace) -> Tensor:
        """Return the mean divergence of one layer from its reference."""
        if layer.name not in self.layer_names:
            raise ValueError(
                f"references must hold a router for layer {layer.name!r}, got those of {list(self.layer_names)}"
            )
        if layer.inputs is None:
            raise ValueError(
                f"layer {layer.name!r}: the anchor needs the router's input, which this trace does not hold: "
                "capture with RouterCapture(model, keep_inputs=True)"
            )
        present = without_padding(layer, trace)
        with torch.no_grad():
            reference = self.references[self.layer_names.index(layer.name)]
            # a callback's loss is no part of the model, so that nobody else moves it to the model's device
            logits = reference.to(layer.inputs.device)(layer.inputs.flatten(0, 1)).view(*trace.shape, -1)
            log_reference = without_padding(replace(layer, logits=logits), trace).log_probabilities
        return mean_kl(present.log_probabilities, log_reference, trace.valid_mask)
