"""Bring the monitor of routing to Lightning."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from consistency_reg.callbacks.listening import ListeningCallback
from consistency_reg.callbacks.loggers import TrainerBoard, define_axes, logged_step
from consistency_reg.callbacks.trainer_state import domain_names
from consistency_reg.capture import RouterAdapter
from consistency_reg.masks import Masks, token_ids
from consistency_reg.optional import require
from consistency_reg.routing import RoutingTrace
from consistency_reg.session import ListenOptions, Which
from consistency_reg.tracking.alarms import Alarms
from consistency_reg.tracking.board import TOKENS
from consistency_reg.tracking.monitor import MonitorCore
from consistency_reg.tracking.tradeoff import TradeOff

with require("lightning"):
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.utilities.rank_zero import rank_zero_warn


class RoutingMonitor(ListeningCallback):
    """Measure routing, in validation over each dataloader (domain) and over all, and show it in every logger.

    ``trainer.test`` is measured in the same way, under ``test/``, without pictures, alarms and trade-off. In
    ``trainer.predict``, where Lightning logs nothing, nothing is measured, which is said once.

    Under ``val/``, of the model: ``srp/m16``, ``rho_hat/m16``, ``threshold/m16``, ``local_gain/m16``, ``static_srp``,
    ``overlap``, ``cache/lru_k``, ``cache/lru_2k``, ``cache/lru_25pct`` (hit rates), ``balance/cv``, ``balance/sd``,
    ``balance/max_mean``, ``balance/min_share``, ``balance/local_cv/m16``. Of each domain, if there are several: the
    same with the domain's name behind. Of each layer: SRP, caches, global balance and overlap with ``/layer_00``
    behind. What they mean: :mod:`consistency_reg.measures`. The sanity check of a trainer is not measured, and
    nothing is logged of an m that every document is shorter than.

    Under ``train/``, at the steps that the trainer logs: SRP, static SRP, local gain and cache hits of that step's
    batch. ``trainer/tokens`` counts the tokens seen. ``tradeoff/`` holds the point of every validation: quality,
    LRU misses, SRP.

    wandb also gets, at every validation, ``val/experts`` and ``val/domains`` (tables of all experts and domains),
    ``val/routing/NAME`` (tokens x experts of a text that stays the same), ``val/cache/curve`` (hit rate by cache size),
    and in its summary, next to the last value of everything, ``best/``: the model's measures at the validation of best
    quality. TensorBoard gets the pictures. They need the extra ``plots``.

    A router that collapses, and a consistency term without gradient, are warned of once, and alert wandb's user.

    Args:
        segment_lengths: m of SRP and of local balance.
        cache_ratios: rho of the LRU caches, slots = rho * K.
        cache_shares: more LRU caches, as a share of a layer's experts.
        masks: ``batch -> (valid, document_ids)``, each [B, T] or None; reads what the model is called with, and the
            usual keys of the batch, when None (docs/tokens.md).
        adapters: kinds of routers that the capture does not know by itself.
        layers: regular expression on the routers' names; those of the model that is trained when None.
        tokens: "labels": only tokens that have a label count (docs/tokens.md); "all": all that are no padding.
        quality: the logged validation metric, lower is better, that the trade-off and ``best/`` are about; the first of
            ``val/ppl``, ``val/perplexity``, ``val/loss``, ``val_loss``, ``eval_loss`` that the module logs when None.
            Where it is logged for each of several dataloaders, their mean counts, weighted by their tokens.
        training: measure training batches too; only with automatic optimization.
        samples: how many texts to draw, the first row of as many validation dataloaders.
        tokenizer: names the tokens of the texts by ``decode``; the data module's ``tokenizer`` when None.
        alarms: the bounds to warn at, see :class:`~consistency_reg.tracking.alarms.Alarms`; the usual ones when None.

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
        layers: str | None = None,
        tokens: Which = "all",
        quality: str | None = None,
        training: bool = True,
        samples: int = 2,
        tokenizer: Any = None,
        alarms: Alarms | None = None,
    ) -> None:
        super().__init__(ListenOptions(masks, adapters, layers, tokens))
        self.core = MonitorCore(
            segment_lengths, cache_ratios, cache_shares, quality=quality, samples=samples, alarms=alarms
        )
        self.training = training
        self.tokenizer = tokenizer
        self._tokens: Tensor | int = 0
        self._fitting = False
        self._records_training = False
        self._said = False
        self._unheard = False  # a batch of a validation, without a forward

    @property
    def current(self) -> dict[str, float]:
        """Return ``SRP`` and ``misses`` as measured last; empty before that."""
        return self.core.current

    @property
    def tradeoff(self) -> TradeOff:
        """Return the trade-off of the run, and its best validation."""
        return self.core.tradeoff

    @property
    def tokens(self) -> int:
        """Count the real tokens seen in training by all processes, which are taken to see equally many."""
        return int(self._tokens)

    def usage_profile(self) -> str:
        """Return how many tokens of the last validation or test used each expert, over all processes and domains.

        Written to a file it is a profile for engines that keep the most used experts in memory: a line
        ``layer expert count`` for each expert, layers numbered from 0 among those with routers.

        Raises:
            RuntimeError: no validation was measured.
        """
        return self.core.usage_profile()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget another training, give wandb its axes, and draw pictures if a logger holds them."""
        if stage == "fit" and trainer.global_step == 0 and self.tokens:
            self._tokens = 0
            self.core.begin_anew()
        define_axes(trainer)
        board = TrainerBoard(trainer)
        if board.shows_pictures:
            tokenizer = self.tokenizer or getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
            self.core.draw(board, None if tokenizer is None else tokenizer.decode)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the routers, before the first forward, so that compiled models are heard too."""
        self._fitting = True
        self.listen(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the hooks off the module."""
        self.release()

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
        if self._records_training:
            self.record()

    def watch_term(self, weighted: Tensor, trace: RoutingTrace) -> None:
        """Measure, in a step that will be logged, whether the consistency term reaches the routers."""
        if self._records_training:
            self.core.watch_term(weighted, trace)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Stop recording: activation checkpointing runs the routers again in the backward pass."""
        self._recording.close()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the tokens, and log the routing of a step that is logged."""
        self._recording.close()
        if self._listener is None:
            return
        self._tokens = self._tokens + self._listener.count_tokens(batch) * trainer.world_size
        if isinstance(self._tokens, Tensor) or self._tokens:
            pl_module.log(TOKENS, torch.as_tensor(self._tokens, dtype=torch.float32))
        if self._records_training and outputs:  # nothing where training_step skipped the batch
            for name, value in self.core.training_step(self._trace(batch)).items():
                pl_module.log(f"train/{name}", value.float(), prog_bar=name in self.core.headline_names)
        self._listener.done()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the routers, outside of fit."""
        self._unheard = False
        if not trainer.sanity_checking:
            self.listen(trainer, pl_module)

    def on_validation_batch_start(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        """Record what runs until the batch ends."""
        if not trainer.sanity_checking:
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
        """Measure the batch, and keep the first row of the first one for its picture."""
        if self._listener is None:
            return
        self._recording.close()
        self._unheard |= not self._listener.heard
        if self._listener.heard and not trainer.sanity_checking:
            self.core.validation_batch(
                self._listener.trace(batch),
                dataloader_idx,
                name=domain_names(trainer)[dataloader_idx],
                token_ids=token_ids(batch),
                draw=batch_idx == 0 and not trainer.testing,
                board=TrainerBoard(trainer),
            )
        self._listener.done()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the measures of the domains, and of all of them as one."""
        if not trainer.sanity_checking and self._log_measures(trainer, pl_module, "val") and self.tokens:
            pl_module.log(TOKENS, float(self.tokens))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show what goes with the numbers: alarms, the trade-off with the module's quality, its best, pictures."""
        self.core.show(
            TrainerBoard(trainer),
            trainer.callback_metrics,  # type: ignore[arg-type]
            step=logged_step(trainer),
            tokens=self.tokens,
            first=trainer.is_global_zero,
        )
        if not self._fitting:
            self.release()

    # A test is measured as a validation is.
    on_test_start = on_validation_start
    on_test_batch_start = on_validation_batch_start
    on_test_batch_end = on_validation_batch_end

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the measures of the domains, and of all of them as one."""
        self._log_measures(trainer, pl_module, "test")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the hooks off the module."""
        self.release()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn once that nothing is measured in predictions."""
        if not self._said:
            self._said = True
            rank_zero_warn(
                "RoutingMonitor measures nothing in trainer.predict, where Lightning logs nothing: use "
                "trainer.validate or trainer.test on the same data"
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the hooks off the module."""
        self.release()

    def state_dict(self) -> dict[str, Any]:
        """Return the tokens seen and the best validation so far."""
        return {"tokens": self.tokens} | self.core.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from :meth:`state_dict`."""
        self._tokens = state_dict["tokens"]
        self.core.load_state_dict(state_dict)

    def _log_measures(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> bool:
        """Log what was measured, under the name of a stage; return whether there is something."""
        if self._listener is None:
            return False
        values = self.core.end_validation(domain_names(trainer), pl_module.device)
        if not values and self._unheard:
            self._listener.trace()  # says why no batch at all was heard
        pl_module.log_dict({f"{stage}/{name}": value.float() for name, value in values.items()})
        return bool(values)

    def _trace(self, batch: Any) -> RoutingTrace:
        assert self._listener is not None
        try:
            with warnings.catch_warnings():  # a measure needs no gradient
                warnings.filterwarnings("ignore", message="a loss on this trace has no gradient")
                return self._listener.trace(batch)
        except RuntimeError as error:
            raise RuntimeError(f"{error}. RoutingMonitor(training=False) leaves training batches alone") from error

    def release(self) -> None:
        """Take the hooks off the module, and forget what was counted of a validation."""
        self._fitting = False
        self.core.reset()
        super().release()
