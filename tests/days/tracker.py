"""The tracker's day: a module of one's own is watched in wandb, offline, and so is a run of the command.

docs/tracking.md has the lines and commands.
"""

import sysconfig
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from torch.utils.data import DataLoader
from transformers import OlmoeConfig, OlmoeForCausalLM
from typed import SMALL, shell

from consistency_reg import ConsistencyRegularizer, LocalConsistencyLoss, RoutingMonitor


class Mine(LightningModule):
    """A module that knows nothing of this package."""

    def __init__(self):
        super().__init__()
        sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
        self.model = OlmoeForCausalLM(
            OlmoeConfig(vocab_size=256, num_experts=8, num_experts_per_tok=2, max_position_embeddings=64, **sizes)
        )

    def training_step(self, batch, batch_idx):
        """Return the loss of the model."""
        return self.model(**batch).loss

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        """Log the loss of each validation set."""
        self.log("val_loss", self.model(**batch).loss)

    def configure_optimizers(self):
        """Return AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def loader(name, rows):
    """Return rows of the bytes of a module of Python's standard library."""
    text = Path(sysconfig.get_path("stdlib"), name).read_bytes()[: rows * 64]
    ids = torch.tensor(list(text)).view(-1, 64)
    return DataLoader([{"input_ids": row, "labels": row} for row in ids], batch_size=8)


# A module of one's own, two validation sets.
loggers = [WandbLogger(project="moe", mode="offline"), CSVLogger("logs")]
term = ConsistencyRegularizer(LocalConsistencyLoss(), weight=0.35, warmup_steps=2)
trainer = Trainer(
    callbacks=[term, RoutingMonitor()], logger=loggers, log_every_n_steps=2, max_epochs=3, accelerator="cpu"
)
trainer.fit(Mine(), loader("argparse.py", 48), [loader("typing.py", 16), loader("inspect.py", 16)])

# A run of the command: offline by itself, where there is no login.
shell(f"consistency-reg fit --config quickstart --run_dir runs/first {SMALL}")
shell("consistency-reg report runs/first --out report --wandb consistency-reg")
