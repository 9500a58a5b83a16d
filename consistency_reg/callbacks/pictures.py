"""What loggers for pictures get at a validation: fixed texts, the cache curve, the table of experts."""

from typing import Any

import torch
from torch import Tensor

from consistency_reg.callbacks.batches import domain_names, token_ids
from consistency_reg.callbacks.loggers import Table, log_pictures
from consistency_reg.optional import require
from consistency_reg.routing import RoutingTrace
from consistency_reg.tracking.accumulate import Measured, RoutingMeasures
from consistency_reg.tracking.experts import COLUMNS

with require("lightning"):
    from lightning.pytorch import Trainer
    from lightning.pytorch.utilities.rank_zero import rank_zero_warn
with require("plots"):
    from consistency_reg.tracking.figures import Sample, cache_curve, mean_curve, routing_heatmap

SAMPLE_TOKENS = 64


class RoutingPictures:
    """Keeps the routing of a few texts of a validation and draws it: the same texts every time.

    Args:
        samples: how many texts, the first row of as many dataloaders.
        tokenizer: names tokens by ``decode``; the data module's ``tokenizer`` when None.
    """

    def __init__(self, samples: int, tokenizer: Any = None) -> None:
        self.samples = samples
        self.tokenizer = tokenizer
        self._kept: dict[int, Sample] = {}
        self._texts: dict[int, Tensor] = {}  # token ids at the first validation

    def keep(self, trainer: Trainer, trace: RoutingTrace, batch: Any, loader: int) -> None:
        """Keep the first row of the first batch of a dataloader, if its text is one to draw."""
        if loader >= self.samples:
            return
        kept = trace.valid_mask[0].nonzero().flatten()[:SAMPLE_TOKENS]
        ids = token_ids(batch)
        text = None if ids is None or ids.shape[1] < trace.shape[1] else ids[0, kept].cpu()
        if text is not None and not torch.equal(self._texts.setdefault(loader, text), text):
            rank_zero_warn("the first row of a validation dataloader changes: its pictures of routing do not compare")
        self._kept[loader] = Sample(
            name=domain_names(trainer)[loader],
            expert_ids=[expert_ids[0, kept].cpu() for expert_ids in trace.expert_ids],
            num_experts=[layer.num_experts for layer in trace],
            layer_names=[f"layer_{layer:02d}" for layer in range(len(trace))],
            document_ids=None if trace.document_ids is None else trace.document_ids[0, kept].cpu(),
            tokens=None if text is None else self._named(trainer, text),
        )

    def log(self, trainer: Trainer, measured: Measured, measures: RoutingMeasures) -> None:
        """Draw what was kept and measured, log it, and forget the texts' routing."""
        samples, self._kept = self._kept, {}
        if not trainer.is_global_zero:
            return
        figures = {f"val/routing/{sample.name}": routing_heatmap(sample) for sample in samples.values()}
        figures["val/cache/curve"] = cache_curve(measured.hit_rates, measures.cache_shares)
        columns = [f"SRP m{measures.usual_length}" if name == "SRP" else name for name in COLUMNS]
        curve = [
            [ratio, rate, "2K" if ratio == 2 else None]
            for ratio, rate in zip(*mean_curve(measured.hit_rates), strict=True)
        ]
        tables = {
            "val/experts": Table(columns, [expert.row() for expert in measured.experts]),
            "val/cache/hit_rates": Table(["cache ratio", "LRU hit rate", "mark"], curve),
        }
        log_pictures(trainer, figures, tables)

    def _named(self, trainer: Trainer, text: Tensor) -> list[str] | None:
        tokenizer = self.tokenizer or getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
        return None if tokenizer is None else [str(tokenizer.decode([token])) for token in text.tolist()]
