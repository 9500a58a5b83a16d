"""Lightning callbacks: one adds the consistency term to a module's loss, one measures routing at validation."""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from consistency_reg.capture import RouterAdapter, RouterCapture
from consistency_reg.losses import LocalConsistencyLoss, RoutingLoss
from consistency_reg.losses.consistency import check_segment_lengths
from consistency_reg.metrics import CacheHitRate, RoutingBalance, SegmentRoutingPerformance
from consistency_reg.metrics.base import RoutingMetric
from consistency_reg.metrics.hit_rates import ModelHitRates
from consistency_reg.optional import require
from consistency_reg.routing import RoutingTrace

with require("lightning"):
    from lightning.pytorch import Callback, LightningModule, Trainer

Masks = tuple[Tensor | None, Tensor | None]


def batch_masks(batch: Any) -> Masks:
    """(valid, document_ids) of a batch, both [B, T] or None.

    From a mapping with the usual keys: ``attention_mask`` (0/1 or bool, [B, T]) says which tokens are real, and
    ``document_ids`` or else ``position_ids`` (a new document wherever they do not go on by one) where documents begin.

    Example:
        >>> import torch
        >>> valid, document_ids = batch_masks({"position_ids": torch.tensor([[0, 1, 2, 0, 1]])})
        >>> valid, document_ids
        (None, tensor([[0, 0, 0, 1, 1]]))
    """
    if not isinstance(batch, Mapping):
        return None, None
    valid, document_ids = batch.get("attention_mask"), batch.get("document_ids")
    if valid is not None:
        valid = valid.bool() if valid.dim() == 2 else None
    if document_ids is None and (positions := batch.get("position_ids")) is not None and positions.dim() == 2:
        begins = positions.new_zeros(positions.shape)
        begins[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
        document_ids = begins.cumsum(dim=1)
    return valid, document_ids


def domain_names(trainer: Trainer) -> list[str]:
    """The names of the validation loaders: the data module's ``domains`` if it has one for each, else their numbers."""
    loaders = len(trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches)
    names = getattr(getattr(trainer, "datamodule", None), "domains", None) or []
    return list(names) if len(names) == loaders else [str(index) for index in range(loaders)]


class ConsistencyRegularizer(Callback):
    """Adds ``weight(step) * loss(routing)`` to the loss that ``training_step`` returns; the module stays as it is.

    Logs, at the steps that the trainer logs, ``train/consistency/loss`` (raw), ``/weight``, ``/weighted`` and the raw
    value of each layer as ``/layer_00``, ....

    Args:
        loss: any :class:`~consistency_reg.losses.RoutingLoss`; ``LocalConsistencyLoss()`` when None.
        weight: weight of the term, >= 0.
        warmup_steps: optimizer steps over which the weight rises linearly from 0.
        start_step: optimizer step at which the term, and its warm-up, begins.
        masks: ``batch -> (valid, document_ids)``, each [B, T] or None; reads the usual keys of a mapping when None.
        adapters: kinds of routers that the capture does not know by itself.

    Raises:
        ValueError: a negative or non-finite weight; a model without routers (at the start of ``fit``).
        RuntimeError: manual optimization; a ``training_step`` that returns no loss; a term without gradient.

    Example:
        >>> callback = ConsistencyRegularizer(weight=0.3, warmup_steps=100)
        >>> callback.weight_at(50)
        0.15
    """

    def __init__(
        self,
        loss: RoutingLoss | None = None,
        weight: float = 0.3,
        warmup_steps: int = 0,
        *,
        start_step: int = 0,
        masks: Callable[[Any], Masks] | None = None,
        adapters: Sequence[RouterAdapter] = (),
    ) -> None:
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"weight must be a finite number >= 0, got {weight}")
        for name, steps in (("warmup_steps", warmup_steps), ("start_step", start_step)):
            if steps < 0:
                raise ValueError(f"{name} must be >= 0, got {steps}")
        self.loss = LocalConsistencyLoss() if loss is None else loss
        self.weight = float(weight)
        self.warmup_steps = warmup_steps
        self.start_step = start_step
        self.masks = masks or batch_masks
        self.adapters = tuple(adapters)
        self._capture: RouterCapture | None = None

    def weight_at(self, step: int) -> float:
        """The weight at an optimizer step."""
        since = step - self.start_step
        if since < 0:
            return 0.0
        return self.weight * min(1.0, since / self.warmup_steps) if self.warmup_steps else self.weight

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the routers and wrap ``training_step``."""
        if not pl_module.automatic_optimization:
            raise RuntimeError(
                "ConsistencyRegularizer adds its term to the loss that training_step returns, but "
                f"{type(pl_module).__name__} uses manual optimization: call "
                "consistency_reg.LocalConsistencyLoss on RouterCapture(model).trace() in training_step instead"
            )
        self._capture = RouterCapture(pl_module, self.adapters).attach()
        self.loss.to(pl_module.device)
        original = pl_module.training_step

        @functools.wraps(original)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            assert self._capture is not None
            with self._capture.recording():
                output = original(*args, **kwargs)
            return output if output is None else self._add_term(trainer, pl_module, output, args[0] if args else None)

        pl_module.training_step = training_step  # type: ignore[method-assign]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give ``training_step`` back."""
        self._release(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give ``training_step`` back."""
        self._release(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The state of the loss."""
        return {"loss": self.loss.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.loss.load_state_dict(state_dict["loss"])

    def _add_term(self, trainer: Trainer, pl_module: LightningModule, output: Any, batch: Any) -> Any:
        if isinstance(output, Mapping):
            if not isinstance(output.get("loss"), Tensor):
                raise RuntimeError(f"training_step must return its loss under the key 'loss', got keys {list(output)}")
            return {**output, "loss": self._add_term(trainer, pl_module, output["loss"], batch)}
        if not isinstance(output, Tensor):
            raise RuntimeError(f"training_step must return its loss, got {type(output).__name__}")
        assert self._capture is not None
        trace = self._capture.trace(*self.masks(batch))
        self._capture.clear()
        value_L = self.loss.per_layer(trace)
        term, weight = value_L.mean(), self.weight_at(trainer.global_step)
        if weight and not term.requires_grad:
            raise RuntimeError(
                "the consistency term has no gradient: the routers' scores come without a graph (routers and all that "
                "feeds them are frozen, or activation checkpointing is reentrant: use use_reentrant=False)"
            )
        weighted = weight * term
        logged: dict[str, Any] = {"loss": term.detach(), "weight": weight, "weighted": weighted.detach()}
        logged |= {f"layer_{index:02d}": value for index, value in enumerate(value_L.detach())}
        pl_module.log_dict({f"train/consistency/{name}": value for name, value in logged.items()})
        return output + weighted.to(output.dtype)

    def _release(self, pl_module: LightningModule) -> None:
        if self._capture is None:
            return
        self._capture.detach()
        self._capture = None
        pl_module.__dict__.pop("training_step", None)


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
        """Add the batch to its domain."""
        if self._capture is None:
            return
        self._recording.close()
        trace = self._capture.trace(*self.masks(batch)).detach()
        if dataloader_idx not in self._domains:
            self._domains[dataloader_idx] = self._metrics(trace)
        for metric in self._domains[dataloader_idx].values():
            metric.update(trace)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the domains, then all of them as one."""
        if self._capture is None:
            return
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
        if self._capture is not None:
            self._capture.detach()
            self._capture = None


def _log_name(key: str) -> str:
    """From a metric's key to a name that loggers group: ``srp_m16_layer_00`` -> ``srp/m16/layer_00``."""
    key = re.sub(r"_(layer_\d+)$", r"/\1", key)
    key = re.sub(r"_(m\d+|document)(/|$)", r"/\1\2", key)
    key = key.replace("max_over_mean", "max_mean").replace("size_ratio", "rho_hat")
    return key.replace("local_cv", "balance/local_cv").replace("balance_", "balance/")
