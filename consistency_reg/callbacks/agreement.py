"""Measure in Lightning how far fine-tuning takes a model's routing from what it was."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric

from consistency_reg.callbacks.listening import ListeningCallback
from consistency_reg.capture import RouterAdapter
from consistency_reg.functional.agreement import agreement_mean
from consistency_reg.masks import Masks
from consistency_reg.measures import HIT_RATE
from consistency_reg.measures.reading import VALIDATION
from consistency_reg.metrics import SegmentCacheHitRate
from consistency_reg.optional import require
from consistency_reg.routing import RoutingTrace
from consistency_reg.session import ListenOptions, Which

with require("lightning"):
    from lightning.pytorch import LightningModule, Trainer

Batch = tuple[int, int]  # dataloader, batch


class ExpertAgreement(ListeningCallback):
    """Compares the experts of every validation with those of the first one, on the same text.

    The first validation of the callback is to come before training (``trainer.validate``, then ``trainer.fit``): its
    expert ids are kept, a byte each for up to 256 experts. Logs ``val/agreement``, the share of a token's experts that
    were chosen by the model as it was too, and ``val/agreement/layer_00``, ... for each layer; 1 in the first
    validation. Beside it the segment cache best hit rate, which tells what a cache could gain at most:
    ``val/cache/sch_m16_k`` and ``val/cache/sch_m16_2k``. The sanity check of a trainer is not counted.

    Args:
        segment_length: m of SCH.
        cache_ratios: rho of its caches, slots = rho * K.
        masks: see :class:`~consistency_reg.RoutingMonitor`, as are adapters, layers and tokens.

    Raises:
        RuntimeError: a validation has batches that the first one did not have.
    """

    def __init__(
        self,
        segment_length: int = 16,
        cache_ratios: Sequence[float] = (1.0, 2.0),
        *,
        masks: Callable[[Any], Masks] | None = None,
        adapters: Sequence[RouterAdapter] = (),
        layers: str | None = None,
        tokens: Which = "all",
    ) -> None:
        super().__init__(ListenOptions(masks, adapters, layers, tokens))
        self.segment_length = segment_length
        self.cache_ratios = tuple(cache_ratios)
        self._original: dict[Batch, list[Tensor]] = {}
        self._recorded = False
        self._agreement: list[MeanMetric] = []
        self._sch: SegmentCacheHitRate | None = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the routers."""
        if not trainer.sanity_checking:
            self.listen(trainer, pl_module)
            self._agreement = []
            self._sch = None

    def on_validation_batch_start(self, *_: Any, **__: Any) -> None:
        """Record what runs until the batch ends."""
        self.record()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the experts of the first validation, compare those of the others."""
        if self._listener is None:
            return
        self._recording.close()
        trace = self._listener.trace(batch)
        self._listener.done()
        if self._sch is None:
            self._agreement = [MeanMetric().to(pl_module.device) for _ in trace]
            options = {"segment_lengths": [self.segment_length], "cache_ratios": self.cache_ratios}
            self._sch = SegmentCacheHitRate.from_trace(trace, **options)
        self._sch.update(trace)
        key = (dataloader_idx, batch_idx)
        if not self._recorded:
            self._original[key] = [_compact(layer.expert_ids, layer.num_experts) for layer in trace]
        self._compare(trace, key)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the agreement and the hit rates."""
        if self._listener is None or self._sch is None:
            return
        self.release()
        self._recorded = True
        layers = [metric.compute() for metric in self._agreement]
        values = {"val/agreement": torch.stack(layers).mean()}
        values |= {f"val/agreement/layer_{index:02d}": value for index, value in enumerate(layers)}
        rates = self._sch.results()[self.segment_length]
        for ratio in self.cache_ratios:
            name = HIT_RATE.at(cache=f"sch_m{self.segment_length}", ratio=ratio).within(VALIDATION).name
            values[name] = rates.at(ratio).float()
        pl_module.log_dict(values)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the hooks off the module."""
        self.release()

    def _compare(self, trace: RoutingTrace, key: Batch) -> None:
        if key not in self._original:
            raise RuntimeError(
                f"ExpertAgreement compares the same batches, but batch {key[1]} of validation loader {key[0]} was not "
                "in the first validation: do not change the loaders or limit_val_batches between the two"
            )
        for metric, layer, original in zip(self._agreement, trace, self._original[key], strict=True):
            mean = agreement_mean(layer.expert_ids, original.to(layer.expert_ids), trace.valid)
            metric.update(mean.value, mean.count)


def _compact(expert_ids: Tensor, num_experts: int) -> Tensor:
    """Return the ids on the CPU, in the smallest integers that hold them."""
    return expert_ids.to("cpu", torch.uint8 if num_experts <= 256 else torch.int32)
