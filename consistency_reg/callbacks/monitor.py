"""The measures of routing as a Lightning callback."""

import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from consistency_reg.callbacks.batches import Masks, batch_masks, domain_names
from consistency_reg.capture import RouterAdapter, RouterCapture
from consistency_reg.losses.consistency import check_segment_lengths
from consistency_reg.metrics import CacheHitRate, RoutingBalance, SegmentRoutingPerformance
from consistency_reg.metrics.base import RoutingMetric
from consistency_reg.metrics.hit_rates import ModelHitRates
from consistency_reg.optional import require
from consistency_reg.routing import RoutingTrace

with require("lightning"):
    from lightning.pytorch import Callback, LightningModule, Trainer

ROWS_AT_ONCE = 256  # simulated caches take a step for all rows at once: few rows cost nearly what many do


class RoutingMonitor(Callback):
    """Measures routing at validation, for each dataloader (domain) and over all, and logs it under ``val/``.

    Of the model: ``srp/m16``, ``rho_hat/m16``, ``threshold/m16``, ``local_gain/m16``, ``static_srp``, ``overlap``,
    ``cache/lru_k``, ``cache/lru_2k``, ``cache/lru_25pct`` (hit rates), ``balance/cv``, ``balance/sd``,
    ``balance/max_mean``, ``balance/min_share``, ``balance/local_cv/m16``. Of each layer: the same with ``/layer_00``
    behind, for SRP, caches, global balance and overlap. Of each domain, if there are several: SRP, with the domain's
    name behind. What they mean: :mod:`consistency_reg.metrics`. The sanity check of a trainer is not measured.

    Args:
        segment_lengths: m of SRP and of local balance.
        cache_ratios: rho of the LRU caches, slots = rho * K.
        cache_shares: more LRU caches, as a share of a layer's experts.
        masks: ``batch -> (valid, document_ids)``, each [B, T] or None; reads the usual keys of a mapping when None.
        adapters: kinds of routers that the capture does not know by itself.
    """

    def __init__(
        self,
        segment_lengths: Sequence[int] = (4, 16, 64),
        cache_ratios: Sequence[float] = (1.0, 2.0),
        cache_shares: Sequence[float] = (0.25,),
        *,
        masks: Callable[[Any], Masks] | None = None,
        adapters: Sequence[RouterAdapter] = (),
    ) -> None:
        self.segment_lengths = check_segment_lengths(segment_lengths)
        self.cache_ratios = tuple(cache_ratios)
        self.cache_shares = tuple(cache_shares)
        self.masks = masks or batch_masks
        self.adapters = tuple(adapters)
        self._capture: RouterCapture | None = None
        self._recording = ExitStack()
        self._domains: dict[int, dict[str, RoutingMetric]] = {}
        self._waiting: dict[int, list[RoutingTrace]] = {}

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the routers."""
        if not trainer.sanity_checking:
            self._capture = RouterCapture(pl_module, self.adapters).attach()

    def on_validation_batch_start(self, *_: Any, **__: Any) -> None:
        """Record what runs until the batch ends."""
        if self._capture is not None:
            self._recording.enter_context(self._capture.recording())

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the batch's expert ids until there are enough rows to measure at once."""
        if self._capture is None:
            return
        self._recording.close()
        trace = _ids_alone(self._capture.trace(*self.masks(batch)))
        self._capture.clear()
        waiting = self._waiting.setdefault(dataloader_idx, [])
        if waiting and (waiting[0].shape[1] != trace.shape[1] or len(waiting) * waiting[0].shape[0] >= ROWS_AT_ONCE):
            self._measure(dataloader_idx)
        self._waiting[dataloader_idx].append(trace)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the domains, then all of them as one."""
        if self._capture is None:
            return
        for dataloader_idx in self._waiting:
            self._measure(dataloader_idx)
        self._release()
        names = domain_names(trainer)
        domains, self._domains = self._domains, {}
        values: dict[str, Tensor] = {}
        if len(domains) > 1:
            for index, metrics in domains.items():
                srp = metrics["srp"].compute()
                values |= {f"{_log_name(key)}/{names[index]}": srp[key] for key in srp if "layer" not in key}
        total, *others = domains.values()
        for other in others:
            for name, metric in total.items():
                metric.merge_state(other[name])
        for name in ("srp", "balance"):
            values |= {_log_name(key): value for key, value in total[name].compute().items()}
        values |= self._cache_values(total["lru"].results())
        pl_module.log_dict({f"val/{key}": value.float() for key, value in values.items()})

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the model."""
        self._release()

    def _measure(self, dataloader_idx: int) -> None:
        """Add the batches that wait to their domain."""
        trace = _below_each_other(self._waiting[dataloader_idx])
        self._waiting[dataloader_idx] = []
        if dataloader_idx not in self._domains:
            self._domains[dataloader_idx] = self._metrics(trace)
        for metric in self._domains[dataloader_idx].values():
            metric.update(trace)

    def _metrics(self, trace: RoutingTrace) -> dict[str, RoutingMetric]:
        return {
            "srp": SegmentRoutingPerformance.from_trace(trace, self.segment_lengths),
            "balance": RoutingBalance.from_trace(trace, self.segment_lengths),
            "lru": CacheHitRate.from_trace(trace, "lru"),
        }

    def _cache_values(self, rates: ModelHitRates) -> dict[str, Tensor]:
        """Hit rate by cache size: slots as a multiple of K, or as a share of the experts."""
        at = {f"lru_{'' if ratio == 1 else f'{ratio:g}'}k": ratio for ratio in self.cache_ratios}
        by_layer = {name: [layer.at(ratio) for layer in rates.layers] for name, ratio in at.items()}
        for share in self.cache_shares:
            by_layer[f"lru_{100 * share:g}pct"] = [layer.at_share(share) for layer in rates.layers]
        values = {}
        for name, layers in by_layer.items():
            values[f"cache/{name}"] = torch.stack(layers).mean()
            values |= {f"cache/{name}/layer_{index:02d}": rate for index, rate in enumerate(layers)}
        return values

    def _release(self) -> None:
        self._recording.close()
        self._waiting = {}
        if self._capture is not None:
            self._capture.detach()
            self._capture = None


def _ids_alone(trace: RoutingTrace) -> RoutingTrace:
    """What the measures need of a trace."""
    return replace(trace, scores=None, logits=None, inputs=None)


def _below_each_other(traces: Sequence[RoutingTrace]) -> RoutingTrace:
    """Batches of the same row length as one."""
    first = traces[0]
    some_padding = any(trace.valid is not None for trace in traces)
    valid = torch.cat([trace.valid_mask for trace in traces]) if some_padding else None
    document_ids = None
    if first.document_ids is not None:
        document_ids = torch.cat([trace.document_ids for trace in traces if trace.document_ids is not None])
    layers = zip(*(trace.expert_ids for trace in traces), strict=True)
    return replace(first, expert_ids=[torch.cat(ids) for ids in layers], valid=valid, document_ids=document_ids)


def _log_name(key: str) -> str:
    """From a metric's key to a name that loggers group: ``srp_m16_layer_00`` -> ``srp/m16/layer_00``."""
    key = re.sub(r"_(layer_\d+)$", r"/\1", key)
    key = re.sub(r"_(m\d+|document)(/|$)", r"/\1\2", key)
    key = key.replace("max_over_mean", "max_mean").replace("size_ratio", "rho_hat")
    return key.replace("local_cv", "balance/local_cv").replace("balance_", "balance/")
