"""The dense model from the first layer on that a mixture has turned: all but the MLPs is the mixture's own."""

from typing import Any

import torch
from torch import Tensor, nn

from consistency_reg.optional import require

with require("transformers"):
    from transformers import PreTrainedModel


class DenseTail:
    """Gives a dense model's logits from the hidden states that its layers and the mixture's have in common.

    Only the dense MLPs of the layers that are mixtures are kept; attention, norms and head are those of the mixture,
    which must be frozen and equal.

    Args:
        dense: the model that the mixture was made from; it may be thrown away afterwards.
        mixture: a model by :func:`~consistency_reg.lab.upcycle.convert.upcycle`.

    Attributes:
        first: number of the first layer that is a mixture.

    Raises:
        ValueError: the mixture was made from another model; something besides its blocks learns; it has no block.
    """

    def __init__(self, dense: PreTrainedModel, mixture: PreTrainedModel) -> None:
        layers: Any = mixture.get_submodule("model.layers")
        own = [index for index, layer in enumerate(layers) if hasattr(layer.mlp, "experts")]
        if not own:
            raise ValueError(f"the mixture must have a layer with experts, got {type(mixture).__name__} without")
        blocks = tuple(f"model.layers.{index}.mlp." for index in own)
        _check_common(dense, mixture, blocks)
        self.first = own[0]
        self._mixture = mixture
        self._mlps = {index: dense.get_submodule(f"model.layers.{index}.mlp").requires_grad_(False) for index in own}

    def logits(self, hidden: Tensor, **context: Any) -> Tensor:
        """Return the dense model's logits.

        Args:
            hidden: [B, T, H] what layer :attr:`first` is given.
            context: the other arguments that it is given: positions, mask; a cache of keys and values is left alone.

        Returns:
            [B, T, V].
        """
        layers: Any = self._mixture.get_submodule("model.layers")
        context |= {"past_key_values": None, "use_cache": False}
        for index in range(self.first, len(layers)):
            layer = layers[index]
            mlp = self._mlp(index, layer, hidden.device)
            hidden = hidden + layer.self_attn(layer.input_layernorm(hidden), **context)[0]
            hidden = hidden + mlp(layer.post_attention_layernorm(hidden))
        head: Any = self._mixture.get_output_embeddings()
        return head(self._mixture.get_submodule("model.norm")(hidden))

    def _mlp(self, index: int, layer: Any, device: torch.device) -> nn.Module:
        return self._mlps[index].to(device) if index in self._mlps else layer.mlp


def divergence(dense_logits: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Return KL(dense ‖ mixture) in nats of the distribution of every predicted token.

    Args:
        dense_logits: [B, T, V] of the dense model.
        logits: [B, T, V] of the mixture.
        labels: [B, T]; ``labels[:, t + 1]`` is what position t predicts, -100 is not predicted.

    Returns:
        [predicted tokens], at least 0 but for rounding.

    Example:
        >>> logits, labels = torch.randn(1, 3, 5), torch.tensor([[1, 2, -100]])
        >>> divergence(logits, logits + 1, labels).abs().max() < 1e-5
        tensor(True)
    """
    predicted = labels[:, 1:] != -100
    dense = dense_logits[:, :-1][predicted].float().log_softmax(dim=-1)
    chances = dense.exp()
    soft = nn.functional.cross_entropy(logits[:, :-1][predicted].float(), chances, reduction="none")
    return soft + (chances * dense).sum(dim=-1)


def _check_common(dense: PreTrainedModel, mixture: PreTrainedModel, blocks: tuple[str, ...]) -> None:
    theirs = dense.state_dict()
    for name, weights in mixture.state_dict().items():
        if name.startswith(blocks):
            continue
        there = theirs.get(name)
        if there is None or there.shape != weights.shape or not torch.equal(there, weights.to(there)):
            raise ValueError(f"dense must be the model that the mixture was made from, but its {name} is another")
    learning = [
        name for name, weights in mixture.named_parameters() if weights.requires_grad and not name.startswith(blocks)
    ]
    if learning:
        raise ValueError(
            "nothing but the experts and routers may learn while the dense model is distilled "
            f"(model.model.train: experts), got {learning[0]} and {len(learning) - 1} others"
        )
