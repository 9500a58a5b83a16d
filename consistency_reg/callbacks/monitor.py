"""The measures of routing as a Lightning callback."""

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from consistency_reg.callbacks.batches import count_tokens, domain_names
from consistency_reg.callbacks.loggers import TOKENS, define_axes, shows_pictures
from consistency_reg.callbacks.tradeoff import TradeOff
from consistency_reg.capture import RouterAdapter, RouterCapture
from consistency_reg.functional.segments import check_segment_lengths
from consistency_reg.masks import Masks, batch_masks
from consistency_reg.optional import require
from consistency_reg.routing import RoutingTrace
from consistency_reg.tracking.accumulate import Measured, RoutingMeasures

with require("lightning"):
    from lightning.pytorch import Callback, LightningModule, Trainer


class RoutingMonitor(Callback):
    """Measures routing, in validation over each dataloader (domain) and over all, and shows it in every logger.

    Under ``val/``, of the model: ``srp/m16``, ``rho_hat/m16``, ``threshold/m16``, ``local_gain/m16``, ``static_srp``,
    ``overlap``, ``cache/lru_k``, ``cache/lru_2k``, ``cache/lru_25pct`` (hit rates), ``balance/cv``, ``balance/sd``,
    ``balance/max_mean``, ``balance/min_share``, ``balance/local_cv/m16``. Of each domain, if there are several: the
    same with the domain's name behind. Of each layer: SRP, caches, global balance and overlap with ``/layer_00``
    behind. What they mean: :mod:`consistency_reg.metrics`. The sanity check of a trainer is not measured, and
    nothing is logged of an m that every document is shorter than.

    Under ``train/``, at the steps that the trainer logs: SRP, static SRP, local gain and cache hits of that step's
    batch. ``trainer/tokens`` counts the tokens seen. ``tradeoff/`` holds the point of every validation: quality,
    LRU misses, SRP.

    wandb also gets, at every validation, ``val/experts`` (a table of all experts), ``val/routing/NAME`` (tokens x
    experts of a text that stays the same), ``val/cache/curve`` (hit rate by cache size), and in its summary, beside
    the last value of everything, ``best/``: the model's measures at the validation of best quality. TensorBoard gets
    the pictures. They need the extra ``plots``.

    Args:
        segment_lengths: m of SRP and of local balance.
        cache_ratios: rho of the LRU caches, slots = rho * K.
        cache_shares: more LRU caches, as a share of a layer's experts.
        masks: ``batch -> (valid, document_ids)``, each [B, T] or None; reads the usual keys of a mapping when None.
        adapters: kinds of routers that the capture does not know by itself.
        quality: the logged validation metric, lower is better, that the trade-off and ``best/`` are about; the first of
            ``val/ppl``, ``val/perplexity``, ``val/loss``, ``val_loss`` that the module logs when None.
        training: measure training batches too; only with automatic optimization.
        samples: how many texts to draw, the first row of as many validation dataloaders.
        tokenizer: names the tokens of the texts by ``decode``; the data module's ``tokenizer`` when None.

    Raises:
        ValueError: ratios that are not positive, shares outside of (0, 1]; a model without routers; ``quality`` names
            what the module does not log.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[RoutingMonitor()], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        segment_lengths: Sequence[int] = (4, 16, 64),
        cache_ratios: Sequence[float] = (1.0, 2.0),
        cache_shares: Sequence[float] = (0.25,),
        *,
        masks: Callable[[Any], Masks] | None = None,
        adapters: Sequence[RouterAdapter] = (),
        quality: str | None = None,
        training: bool = True,
        samples: int = 2,
        tokenizer: Any = None,
    ) -> None:
        if samples < 0:
            raise ValueError(f"samples must be at least 0 texts, got {samples}")
        self.segment_lengths = check_segment_lengths(segment_lengths, lowest=2)
        self.cache_ratios = _checked(
            "cache_ratios", cache_ratios, "positive numbers", lambda ratio: 0 < ratio < math.inf
        )
        self.cache_shares = _checked("cache_shares", cache_shares, "numbers in (0, 1]", lambda share: 0 < share <= 1)
        self.masks = masks or batch_masks
        self.adapters = tuple(adapters)
        self.training = training
        self.samples = samples
        self.tokenizer = tokenizer
        self.tradeoff = TradeOff(quality)
        self.current: dict[str, float] = {}  # SRP and misses as measured last
        self._tokens: Tensor | int = 0
        self._capture: RouterCapture | None = None
        self._fitting = False
        self._recording = ExitStack()
        self._records_training = False
        self._unheard = False  # a batch of a validation, without a forward
        self._measures = self._new_measures()
        self._measured: Measured | None = None
        self._pictures: Any = None  # where a logger shows them

    @property
    def tokens(self) -> int:
        """Real tokens seen in training by all processes, which are taken to see equally many."""
        return int(self._tokens)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give wandb its axes, and see whether a logger holds pictures."""
        define_axes(trainer)
        if self._pictures is None and shows_pictures(trainer):
            from consistency_reg.callbacks.pictures import RoutingPictures  # needs matplotlib

            self._pictures = RoutingPictures(self.samples, self.tokenizer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the routers, before the first forward, so that compiled models are heard too."""
        self._fitting = True
        self._capture = RouterCapture(pl_module, self.adapters).attach()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go of the model."""
        self._release()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Record the forward of a step that will be logged."""
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        self._records_training = (
            self.training
            and pl_module.automatic_optimization
            and every > 0
            and (trainer.global_step + 1) % every == 0
            and (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        )
        if self._records_training and self._capture is not None:
            self._recording.enter_context(self._capture.recording())

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Stop to record: activation checkpointing runs the routers again in the backward pass."""
        self._recording.close()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the tokens, and log the routing of a step that is logged."""
        self._recording.close()
        masks = self.masks(batch)
        self._tokens = self._tokens + count_tokens(batch, masks[0]) * trainer.world_size
        if isinstance(self._tokens, Tensor) or self._tokens:
            pl_module.log(TOKENS, torch.as_tensor(self._tokens, dtype=torch.float32))
        if self._capture is None:
            return
        if self._records_training and outputs:  # nothing where training_step skipped the batch
            values = self._measures.of_batch(self._trace(masks))
            self.current = self._measures.headline(values)
            for name, value in values.items():
                pl_module.log(f"train/{name}", value.float(), prog_bar=name in self._measures.headline_names)
        self._capture.clear()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the routers, outside of fit."""
        self._unheard = False
        if self._capture is None and not trainer.sanity_checking:
            self._capture = RouterCapture(pl_module, self.adapters).attach()

    def on_validation_batch_start(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        """Record what runs until the batch ends."""
        if self._capture is not None and not trainer.sanity_checking:
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
        """Measure the batch, and keep the first row of the first one for its picture."""
        if self._capture is None:
            return
        self._recording.close()
        self._unheard |= not self._capture.heard
        if self._capture.heard and not trainer.sanity_checking:
            trace = self._capture.trace(*self.masks(batch))
            self._measures.add(trace, dataloader_idx)
            if self._pictures is not None and batch_idx == 0:
                self._pictures.keep(trainer, trace, batch, dataloader_idx)
        self._capture.clear()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the measures of the domains, and of all of them as one."""
        if self._capture is None or trainer.sanity_checking:
            return
        self._measured = self._measures.results(domain_names(trainer), pl_module.device)
        if self._measured is None:
            if self._unheard:
                self._capture.trace()  # says why no batch at all was heard
            return
        self.current = self._measures.headline(self._measured.model)
        values = self._measured.parts | self._measured.model
        pl_module.log_dict({f"val/{name}": value.float() for name, value in values.items()})
        if self.tokens:
            pl_module.log(TOKENS, float(self.tokens))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what goes with the numbers: the trade-off with the module's quality, the best of it, pictures."""
        if self._measured is not None:
            measured, self._measured = self._measured, None
            self.tradeoff.log(trainer, measured.model, self._measures, self.tokens)
            if self._pictures is not None:
                self._pictures.log(trainer, measured, self._measures)
        if not self._fitting:
            self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the model."""
        self._release()

    def state_dict(self) -> dict[str, Any]:
        """Tokens seen and the best validation so far."""
        return {"tokens": self.tokens, "best": dict(self.tradeoff.best)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._tokens, self.tradeoff.best = state_dict["tokens"], dict(state_dict["best"])

    def _new_measures(self) -> RoutingMeasures:
        return RoutingMeasures(self.segment_lengths, self.cache_ratios, self.cache_shares)

    def _trace(self, masks: Masks) -> RoutingTrace:
        assert self._capture is not None
        try:
            with warnings.catch_warnings():  # a measure needs no gradient
                warnings.filterwarnings("ignore", message="a loss on this trace has no gradient")
                return self._capture.trace(*masks)
        except RuntimeError as error:
            raise RuntimeError(f"{error}. RoutingMonitor(training=False) leaves training batches alone") from error

    def _release(self) -> None:
        self._recording.close()
        self._fitting = False
        self._measures = self._new_measures()
        if self._capture is not None:
            self._capture.detach()
            self._capture = None


def _checked(name: str, values: Sequence[float], which: str, is_right: Callable[[float], bool]) -> tuple[float, ...]:
    numbers = isinstance(values, Sequence) and all(isinstance(value, int | float) for value in values)
    if not numbers or not all(map(is_right, values)):
        raise ValueError(f"{name} must be a list of {which}, got {values!r}")
    return tuple(values)
