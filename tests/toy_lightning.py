"""A user's LightningModule with two routers, and what the tests of the callbacks do with it."""

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from consistency_reg import ConsistencyRegularizer, LocalConsistencyLoss, RouterCapture

T, V = 24, 32


class ToyTopKRouter(nn.Linear):
    def forward(self, x):
        logits = super().forward(x)
        weights, ids = logits.softmax(-1).topk(2)
        return logits, weights, ids


class ToyMoE(LightningModule):
    """A user's module, two routers over an embedding and a head, which knows nothing of the callback."""

    def __init__(self, output: str = "tensor", dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, 8)
        self.routers = nn.ModuleList(ToyTopKRouter(8, 6, bias=False) for _ in range(2))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8, V)
        self.output = output

    def forward(self, ids):
        x = self.embed(ids)
        for router in self.routers:
            _, weights, _ = router(x)
            x = x + 0.1 * weights.sum(-1, keepdim=True) * x
        return self.head(self.dropout(x))

    def training_step(self, batch, batch_idx):
        (ids,) = batch
        loss = nn.functional.cross_entropy(self(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        self.log("train/ce", loss.detach())
        return {"tensor": loss, "dict": {"loss": loss, "extra": 1}, "none": None, "wrong": {"cost": loss}}[self.output]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


class Sharded(ToyMoE):
    """Shards the module by FSDP2, as Lightning wants it."""

    def configure_model(self):
        from torch.distributed.fsdp import fully_shard

        for module in (*self.routers, self):
            fully_shard(module, mesh=self.device_mesh["data_parallel"])


def tokens(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(V, (rows, T), generator=torch.Generator().manual_seed(seed))


def toy(kind: type[ToyMoE] = ToyMoE, **options) -> ToyMoE:
    torch.manual_seed(1)
    return kind(**options)


def fit(module, ids, batch_size, callbacks=(), **trainer_options):
    options = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    } | trainer_options
    trainer = Trainer(callbacks=list(callbacks), **options)
    trainer.fit(module, DataLoader(TensorDataset(ids), batch_size=batch_size, shuffle=False))
    return trainer


def regularizer(**options) -> ConsistencyRegularizer:
    loss = options.pop("loss", None) or LocalConsistencyLoss(
        segment_lengths=(3, 5), scope=options.pop("scope", "global")
    )
    return ConsistencyRegularizer(loss, **({"weight": 2.0} | options))


class Validated(ToyMoE):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        (ids,) = batch
        self.log("val/ce", nn.functional.cross_entropy(self(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()))


class Domains(Validated):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self(batch[0][:, :-1])


def validated(kind=Validated):
    torch.manual_seed(1)
    return kind()


def loader(ids, batch_size=4):
    return DataLoader(TensorDataset(ids), batch_size=batch_size)


def layer_ids(module, ids):
    with torch.no_grad(), RouterCapture(module) as capture:
        module(ids[:, :-1])
    return list(capture.trace().expert_ids)
