"""Distillation of a mixture from the dense model that it was made from, as a Lightning callback."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from consistency_reg.callbacks.trainer_state import domain_names
from consistency_reg.callbacks.training_step import TrainingStepTerm
from consistency_reg.lab.arguments.upcycle import SMOLLM
from consistency_reg.lab.module import next_token_losses
from consistency_reg.lab.upcycle.smollm import place_of
from consistency_reg.lab.upcycle.teacher import DenseTail, divergence
from consistency_reg.optional import require
from consistency_reg.routing import RoutingTrace
from consistency_reg.session import ListenOptions
from consistency_reg.term import Term, check_weight

with require("lightning"):
    from lightning.pytorch import LightningModule, Trainer
    from torchmetrics import MeanMetric
    from transformers import AutoModelForCausalLM

MEASURES = ("ce", "kl")


class Distillation(TrainingStepTerm):
    """Adds ``weight * KL(dense ‖ mixture)`` to the loss that ``training_step`` returns.

    The divergence is that of the distributions of the next token, in nats, a mean over the predicted tokens of a batch.
    The dense model costs what its layers from the first mixture on cost, without gradient: below that both are one.
    Logs ``train/distillation/loss``, ``/weight`` and ``/weighted``, and in validation the dense model's perplexity,
    ``val/dense/ppl``, and the divergence, ``val/dense/kl``, of each domain and of all tokens.

    Args:
        dense: folder or hub id of the dense model, or "smollm2-135m".
        weight: of the term; with 0 the dense model is only measured against.

    Raises:
        ValueError: a negative or non-finite weight; a mixture that was made from another model, or of which more
            learns than its blocks (when the trainer sets up).

    Example:
        >>> Distillation("smollm2-135m", weight=-1.0)
        Traceback (most recent call last):
        ValueError: weight must be a finite number >= 0, got -1.0
    """

    name = "distillation"
    by_hand = "add the divergence"

    def __init__(self, dense: str = SMOLLM, weight: float = 1.0) -> None:
        super().__init__(ListenOptions())
        self.dense = dense
        self.weight = check_weight(weight)
        self._tail: DenseTail | None = None
        self._heard: dict[str, Any] = {}
        self._hooks: list[Any] = []
        self._means: list[dict[str, MeanMetric]] = []

    def is_on(self) -> bool:
        """Return whether the weight is more than 0."""
        return self.weight > 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Load the dense model's MLPs, and listen to the mixture."""
        super().setup(trainer, pl_module, stage)
        model: Any = pl_module.model
        if self._tail is None:
            dense = AutoModelForCausalLM.from_pretrained(place_of(self.dense), dtype=torch.float32)
            self._tail = DenseTail(dense, model)
        first = model.get_submodule("model.layers")[self._tail.first]
        self._hooks = [
            first.register_forward_pre_hook(self._hear_layer, with_kwargs=True),
            model.register_forward_hook(self._hear_model, with_kwargs=True),
        ]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the mixture go."""
        super().teardown(trainer, pl_module, stage)
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._heard = [], {}

    def term(self, step: int, trace: RoutingTrace) -> Term:
        """Return the divergence of one forward."""
        heard = self._heard
        kl = divergence(self._dense_logits(), heard.pop("logits"), heard["labels"]).mean()
        return Term(self.weight * kl, kl.detach(), kl.detach()[None], self.weight)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a mean of each measure for each domain and one for all tokens."""
        domains = len(domain_names(trainer)) + 1
        self._means = [{name: MeanMetric().to(pl_module.device) for name in MEASURES} for _ in range(domains)]

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Measure the dense model, and the mixture against it, on the batch that was just validated."""
        with trainer.precision_plugin.val_step_context():
            dense = self._dense_logits()
        labels = batch["labels"]
        found = {"ce": next_token_losses(dense, labels), "kl": divergence(dense, self._heard.pop("logits"), labels)}
        for means in (self._means[dataloader_idx], self._means[-1]):
            for name, values in found.items():
                means[name].update(values)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the dense model's perplexity, and the divergence from it."""
        names = [f"/{domain}" for domain in domain_names(trainer)] + [""]
        for name, means in zip(names, self._means, strict=True):
            pl_module.log(f"val/dense/ppl{name}", means["ce"].compute().exp())
            pl_module.log(f"val/dense/kl{name}", means["kl"].compute())

    def _hear_layer(self, layer: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Any]) -> None:
        self._heard = {"hidden": args[0].detach(), "kwargs": dict(kwargs)}

    def _hear_model(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        self._heard |= {"logits": output.logits, "labels": kwargs["labels"]}

    @torch.no_grad()
    def _dense_logits(self) -> Tensor:
        assert self._tail is not None
        return self._tail.logits(self._heard["hidden"], **self._heard["kwargs"])
