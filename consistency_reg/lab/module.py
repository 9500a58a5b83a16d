"""Causal language modelling with a mixture of experts, as a plain LightningModule: it knows nothing of consistency."""

import math
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import MeanMetric

from consistency_reg.callbacks import domain_names
from consistency_reg.lab.corpus.data import check_attention, model_inputs
from consistency_reg.losses import LoadBalanceLoss, RouterZLoss
from consistency_reg.session import RoutingSession


class CausalMoE(LightningModule):
    """Trains on the next-token loss plus load-balance and router z-loss; logs perplexity, of every domain and of all.

    Args:
        model: a transformers causal language model whose layers have routers.
        balance: the load-balance loss; ``LoadBalanceLoss()`` when None. A running average over steps is what keeps
            experts alive under a consistency term.
        balance_weight: its weight.
        z_weight: weight of the router z-loss.
        learning_rate: peak of the schedule.
        weight_decay: AdamW's, on matrices only.
        warmup_steps: linear warm-up of the learning rate, then a cosine decay over the rest of training.
        final_learning_rate: where the decay ends, as a share of the peak.
    """

    def __init__(
        self,
        model: nn.Module,
        balance: LoadBalanceLoss | None = None,
        balance_weight: float = 0.1,
        z_weight: float = 0.001,
        learning_rate: float = 3e-3,
        weight_decay: float = 0.1,
        warmup_steps: int = 40,
        final_learning_rate: float = 0.1,
    ) -> None:
        super().__init__()
        options = {"balance_weight": balance_weight, "z_weight": z_weight, "learning_rate": learning_rate}
        for name, value in options.items():
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a finite number >= 0, got {value}")
        self.model: Any = model
        self.balance = LoadBalanceLoss() if balance is None else balance
        self.z_loss = RouterZLoss()
        self.balance_weight = balance_weight
        self.z_weight = z_weight
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.final_learning_rate = final_learning_rate
        self.nats: Any = nn.ModuleList()  # mean cross-entropy of each validation domain, then of all together

    def setup(self, stage: str) -> None:
        """Refuse an attention that would let documents of a row see each other."""
        check_attention(self.model)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Return [B, T, V] next-token logits."""
        return self.model(**model_inputs(batch)).logits

    def token_losses(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the cross-entropy in nats of every predicted token of a batch."""
        return next_token_losses(self(batch), batch["labels"])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy of the next token plus the balance terms."""
        listener = RoutingSession.of(self).listen()
        try:
            with listener.recording():
                cross_entropy = next_token_losses(self(batch), batch["labels"]).mean()
            trace = listener.trace(batch)
        finally:
            listener.release()
        balance, z_loss = self.balance(trace), self.z_loss(trace)
        self.log_dict(
            {"train/ce": cross_entropy.detach(), "train/balance": balance.detach(), "train/z": z_loss.detach()}
        )
        self.log("ce", cross_entropy.detach(), prog_bar=True, logger=False)
        return cross_entropy + self.balance_weight * balance + self.z_weight * z_loss

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Read a balance that knew the routers by their names within ``model``, as earlier versions did."""
        kept = checkpoint["state_dict"].get("balance._extra_state", {})
        known = {name for name, _ in self.named_modules()}
        for state in (kept.get("average", {}), kept.get("pending", {})):
            for layer in [layer for layer in state if layer not in known]:
                state[f"model.{layer}"] = state.pop(layer)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """End the balance's step too: the last of an epoch may have fewer micro-batches than the others."""
        self.balance.end_step()

    def on_validation_start(self) -> None:
        """Prepare one mean for each domain and one for all tokens."""
        if len(self.nats) == 0:
            self.nats.extend(MeanMetric().to(self.device) for _ in range(len(domain_names(self.trainer)) + 1))

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add to the mean cross-entropy of the domain and of all."""
        losses = self.token_losses(batch)
        self.nats[dataloader_idx].update(losses)
        self.nats[-1].update(losses)

    def on_validation_epoch_end(self) -> None:
        """Log cross-entropy and perplexity."""
        names = [f"/{domain}" for domain in domain_names(self.trainer)] + [""]
        means = {name: metric.compute() for name, metric in zip(names, self.nats, strict=True)}
        self.log_dict({f"val/ce{name}": mean for name, mean in means.items()})
        self.log_dict({f"val/ppl{name}": mean.exp() for name, mean in means.items()})
        for metric in self.nats:
            metric.reset()

    def configure_optimizers(self) -> Any:
        """Return AdamW with linear warm-up and cosine decay over ``trainer.max_steps``."""
        # estimated_stepping_batches would set the data up before a checkpoint is loaded: resuming would begin it anew
        total = self.trainer.max_steps
        check_warmup(total, self.warmup_steps)
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self._share_of_peak(step, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _share_of_peak(self, step: int, total: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = min((step - self.warmup_steps) / (total - self.warmup_steps), 1.0)
        cosine = (1 + math.cos(math.pi * progress)) / 2
        return self.final_learning_rate + (1 - self.final_learning_rate) * cosine


def check_warmup(max_steps: int, warmup_steps: int) -> None:
    """Raise ValueError unless steps are left for the decay after the warm-up."""
    if max_steps <= warmup_steps:
        raise ValueError(f"trainer.max_steps must be more than warmup_steps={warmup_steps}, got {max_steps}")


def next_token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return cross-entropy in nats of every predicted token: logits [B, T, V], labels [B, T] -> [predicted tokens].

    ``labels[:, t + 1]`` is what ``logits[:, t]`` predicts; -100 is not predicted.

    Raises:
        ValueError: no label of the batch is to be predicted.
    """
    targets = labels[:, 1:]
    predicted = targets != -100
    if not bool(predicted.any()):
        raise ValueError("labels must hold at least one token to predict after the first, got a batch that is all -100")
    return nn.functional.cross_entropy(logits[:, :-1][predicted].float(), targets[predicted], reduction="none")
