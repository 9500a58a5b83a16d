"""Train with cache-aware routing, and validate with and without it, as a Lightning callback."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor

from consistency_reg.callbacks.monitor import RoutingMonitor
from consistency_reg.callbacks.trainer_state import callbacks_of, domain_names, warn_of_late_start
from consistency_reg.capture import RouterAdapter, RouterCapture
from consistency_reg.distributed import all_sum
from consistency_reg.masks import Masks, batch_masks
from consistency_reg.measures import TRAINED_CACHE_RATIO, TRAINED_MISSES, TRAINED_STRENGTH
from consistency_reg.measures.reading import DEPLOYED, TRAINING, Measure
from consistency_reg.optional import require
from consistency_reg.rerouting import CacheAwareRouting, RoutingSchedule
from consistency_reg.tracking.deployed import DeployedMeasures

with require("lightning"):
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.utilities.rank_zero import rank_zero_warn


class CacheAwareTraining(Callback):
    """Trains a module with :class:`~consistency_reg.CacheAwareRouting` in its forward pass; the module stays as it is.

    The balance losses, a consistency term and the monitor see what was chosen. Logs ``train/routing/strength``,
    ``/cache_ratio`` and ``/misses`` (the share of uses that were not in the cache, first uses included).

    Validation is of the model as it is, under ``val/``, and once more with the routing, under ``val/deployed/``: the
    measures of the model that :class:`~consistency_reg.RoutingMonitor` has, and ``ppl`` and ``ce`` if the module has a
    method ``token_losses(batch)``, which returns the cross-entropy of each predicted token.

    Args:
        strength: of the routing after the ramp; 0 trains without.
        start_step: optimizer step at which the ramp begins.
        ramp_steps: optimizer steps over which the strength rises from 0.
        cache_ratio: slots of each layer's cache in units of its K; or two, between which each step draws one.
        guaranteed: so many of the router's best experts are always chosen.
        method: "prior", "max_rank" or "cumulative".
        seed: of the drawn cache ratios.
        deployed_strength: of the routing in ``val/deployed/``; ``strength`` when None. 0 leaves that validation out.
        deployed_cache_ratio: of that; ``cache_ratio``, or the mean of its two, when None.
        masks: ``batch -> (valid, document_ids)``, each [B, T] or None; reads the usual keys of a mapping when None.
        adapters: kinds of routers that the capture does not know by itself.

    Raises:
        ValueError: values out of range (in the constructor); at the start of ``fit``, a model without routers, or with
            routers that cannot be made to know the cache.

    Example:
        >>> callback = CacheAwareTraining(strength=0.1, start_step=100, ramp_steps=50)
        >>> callback.schedule.strength_at(125)
        0.05
    """

    def __init__(
        self,
        strength: float = 0.1,
        start_step: int = 0,
        ramp_steps: int = 0,
        cache_ratio: float | list[float] = 2.0,
        guaranteed: int = 1,
        method: str = "prior",
        seed: int = 0,
        *,
        deployed_strength: float | None = None,
        deployed_cache_ratio: float | None = None,
        masks: Callable[[Any], Masks] | None = None,
        adapters: Sequence[RouterAdapter] = (),
    ) -> None:
        self.schedule = RoutingSchedule(strength, start_step, ramp_steps, cache_ratio, guaranteed, method, seed)
        ratios = self.schedule.cache_ratios
        self.deployed = RoutingSchedule(
            strength if deployed_strength is None else deployed_strength,
            cache_ratio=sum(ratios) / len(ratios) if deployed_cache_ratio is None else deployed_cache_ratio,
            guaranteed=guaranteed,
            method=method,
        )
        self.masks = masks or batch_masks
        self.adapters = tuple(adapters)
        self._routing: CacheAwareRouting | None = None
        self._fitting = False
        self._said = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the routers, before the first forward, so that compiled models are changed too."""
        self._fitting = True
        self._attach(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if the routing begins after the end of training."""
        if self.schedule.strength:
            warn_of_late_start(trainer, "cache-aware routing", self.schedule.start_step)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Give the routing the strength and the cache of the step."""
        if self._routing is not None:
            self._routing.reset()
            self._routing.given_masks = self.masks(batch)
            self.schedule.begin(self._routing, trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        """Log the routing of the batch, and switch it off until the next one."""
        if self._routing is None:
            return
        logged: dict[Measure, Tensor | float] = {
            TRAINED_STRENGTH: self._routing.strength if self._routing.active else 0.0
        }
        if self._routing.active:
            hits, misses = self._routing.counts.float()
            logged |= {TRAINED_CACHE_RATIO: self._routing.cache_ratio}
            logged |= {TRAINED_MISSES: misses / (hits + misses).clamp_min(1)}
        pl_module.log_dict({measure.at().within(TRAINING).name: value for measure, value in logged.items()})
        self._rest()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the routers, outside of fit."""
        if not trainer.sanity_checking:
            self._attach(pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run the validation once more, with the routing, and log what was measured."""
        if self._routing is None or trainer.sanity_checking or not self.deployed.strength:
            return
        if not hasattr(pl_module, "token_losses"):
            if not self._said:
                rank_zero_warn(
                    f"nothing is logged under val/deployed/: {type(pl_module).__name__} has no method "
                    "token_losses(batch) that returns the cross-entropy of each predicted token"
                )
            self._said = True
            return
        self._routing.reset()
        self.deployed.begin(self._routing, 0)
        try:
            values = self._measure(trainer, pl_module, self._routing)
        finally:
            self._rest()
        pl_module.log_dict({f"{DEPLOYED}/{name}": value for name, value in values.items()})

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the hooks off the model, outside of fit."""
        if not self._fitting:
            self._release()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the hooks off the model."""
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the hooks off the model."""
        self._release()

    def state_dict(self) -> dict[str, Any]:
        """Return the seed; all else that a step has follows from its number."""
        return {"seed": self.schedule.seed}

    def _attach(self, pl_module: LightningModule) -> None:
        if self._routing is None and (self.schedule.strength or self.deployed.strength):
            self._routing = self.schedule.routing(pl_module, self.adapters)
            self.deployed.routing(pl_module, self.adapters)  # refuses what does not fit the model
            self._routing.attach()
            self._rest()

    def _rest(self) -> None:
        if self._routing is not None:
            self._routing.active, self._routing.given_masks = False, None

    def _release(self) -> None:
        self._fitting = False
        if self._routing is not None:
            self._routing.detach()
            self._routing = None

    def _measure(
        self, trainer: Trainer, pl_module: LightningModule, routing: CacheAwareRouting
    ) -> dict[str, Tensor | float]:
        """Return the measures of all validation data by name."""
        names, device = domain_names(trainer), pl_module.device
        monitor = (callbacks_of(trainer, RoutingMonitor) or [RoutingMonitor()])[0]
        measures = DeployedMeasures(monitor.core.new_measures())
        capture = RouterCapture(pl_module, self.adapters)
        sums_D2 = torch.zeros(len(names), 2, dtype=torch.float64, device=_double(device))  # nats, predicted tokens
        with capture:
            for domain, batch in _batches(trainer):
                routing.given_masks = masks = self.masks(batch)
                with trainer.precision_plugin.val_step_context(), capture.recording():
                    losses = cast(Any, pl_module).token_losses(batch)
                sums_D2[domain] += torch.stack([losses.double().sum(), losses.new_tensor(losses.numel()).double()])
                measures.add(capture.trace(*masks), domain)
        found = measures.results(names, device, routing.strength, routing.cache_ratio)
        if not found:
            return {}
        values = {name: value.float() if isinstance(value, Tensor) else value for name, value in found.items()}
        (sums_D2,) = all_sum(sums_D2)
        nats = {f"/{name}": sums for name, sums in zip(names, sums_D2, strict=True)} | {"": sums_D2.sum(dim=0)}
        for name, (total, tokens) in nats.items():
            cross_entropy = total / tokens.clamp_min(1)
            values |= {f"ce{name}": cross_entropy.float(), f"ppl{name}": cross_entropy.exp().float()}
        return values


def _batches(trainer: Trainer) -> Iterator[tuple[int, Any]]:
    """Yield the batches of a validation of this process, on its device, each with the number of its dataloader."""
    loaders = trainer.val_dataloaders
    each = loaders.values() if isinstance(loaders, Mapping) else loaders if isinstance(loaders, Sequence) else [loaders]
    for index, (loader, batches) in enumerate(zip(each, trainer.num_val_batches, strict=True)):
        for batch in islice(loader, None if batches == float("inf") else int(batches)):
            yield index, trainer.strategy.batch_to_device(batch, dataloader_idx=index)


def _double(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "mps" else device  # which has no float64
