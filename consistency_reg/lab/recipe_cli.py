"""A recipe as arguments of LightningCLI: its sections, its defaults, and what is refused before anything is built."""

import argparse
import inspect
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from consistency_reg.optional import require

with require("lightning"):
    from jsonargparse import Namespace
    from lightning.pytorch import Trainer
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from consistency_reg.callbacks import (
    CacheAwareTraining,
    ConsistencyRegularizer,
    ExpertAgreement,
    RouterAnchor,
    RoutingMonitor,
)
from consistency_reg.callbacks.progress import TrainingBar
from consistency_reg.callbacks.trainer_state import callbacks_of
from consistency_reg.lab.arguments.fit import recipe_words
from consistency_reg.lab.checkpoint_files import WholeCheckpoints, let_save, refuse_damaged
from consistency_reg.lab.corpus.data import TextDataModule
from consistency_reg.lab.finetune import follow_checkpoint, is_fine_tuning
from consistency_reg.lab.model import small_moe
from consistency_reg.lab.module import CausalMoE, check_warmup
from consistency_reg.lab.recipe_files import DEFAULTS
from consistency_reg.lab.run_folder import RunFolder, refuse_claimed
from consistency_reg.lab.run_loggers import is_first_process
from consistency_reg.lab.run_progress import RunProgress, StepCheckpoint, check_checkpoints
from consistency_reg.lab.same_recipe import differences, is_longer

A_KEY_OF = {  # each section of a recipe
    "model": "warmup_steps",
    "data": "sequence_length",
    "trainer": "max_steps",
    "consistency": "weight",
    "anchor": "weight",
    "routing": "strength",
    "monitor": "segment_lengths",
}


class RecipeCLI(LightningCLI):
    """Reads a recipe: ``model``, ``data``, ``trainer``, ``consistency`` (the regularizer), ``anchor`` (to earlier
    routers), ``routing`` (that knows the cache), ``monitor``, ``run_dir``.

    The seed decides initial weights and data order, so that runs with one seed are pairs. Nothing is written here, and
    a finished run is not built.

    Attributes:
        folder: of the run.
        recipe: the whole recipe as YAML, defaults included.
        is_finished: whether the folder holds this run, finished.
        goes_on_longer: whether the folder holds this run with fewer steps.
    """

    folder: RunFolder
    recipe: str
    is_finished = False
    goes_on_longer = False

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the callbacks as keys of their own, and values that follow from others."""
        parser.add_lightning_class_args(ConsistencyRegularizer, "consistency")
        parser.add_lightning_class_args(RouterAnchor, "anchor")
        parser.add_lightning_class_args(CacheAwareTraining, "routing")
        parser.add_lightning_class_args(RoutingMonitor, "monitor")
        parser.add_argument("--run_dir", type=str, default="runs/run", help="folder of the run")
        parser.add_argument("--wandb_project", type=str, default="consistency-reg", help="empty for no wandb")
        parser.add_argument("--checkpoint_every", type=int, default=50, help="optimizer steps between two checkpoints")
        parser.add_argument("--keep_checkpoints", type=int, default=0, help="how many of them stay next to the last")
        parser.link_arguments("seed_everything", "data.seed")
        parser.link_arguments("seed_everything", "routing.seed")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse as LightningCLI does, with errors that say what to do."""
        try:
            super().parse_arguments(parser, args)
        except argparse.ArgumentError as error:
            said = " ".join(str(error).split())
            raise ValueError(f"{said} (`consistency-reg fit --print_config` shows every key)") from error

    def before_instantiate_classes(self) -> None:
        """Refuse what could only fail later, and a folder that holds another run."""
        config = self.config
        if not config.run_dir.strip():
            raise ValueError(f"run_dir must be the folder of the run, got {config.run_dir!r}")
        for section, key in A_KEY_OF.items():
            if not isinstance(given := config[section], Namespace) or key not in given:
                got = "a value" if isinstance(given, Namespace) else repr(given)  # which the linked seed has joined
                raise ValueError(f"{section} must hold keys, such as {section}.{key}, got {got}")
        loss = {} if config.consistency.loss is None else config.consistency.loss.init_args
        lengths = [*loss.get("segment_lengths", ()), *config.monitor.segment_lengths]
        if lengths and max(lengths) > config.data.sequence_length:
            raise ValueError(
                "segment_lengths of consistency.loss and monitor must not exceed the context, "
                f"data.sequence_length={config.data.sequence_length}, got {sorted(set(lengths))}"
            )
        check_warmup(config.trainer.max_steps, config.model.warmup_steps)
        check_checkpoints(config.checkpoint_every, config.keep_checkpoints)
        self._let_the_model_follow()
        if is_fine_tuning(config):
            follow_checkpoint(config)
        self.folder = RunFolder(Path(config.run_dir).expanduser())
        self.recipe = self.parser.dump(config, skip_none=False)
        self.compare_with_folder()
        if not self.is_finished:
            self.check_folder()

    @property
    def deployment(self) -> dict[str, Any]:
        """Return the routing to deploy the model with, as arguments of CacheAwareRouting; empty for none."""
        routing = callbacks_of(self.trainer, CacheAwareTraining)[0]
        return routing.deployed.settings() if routing.deployed.strength else {}

    def compare_with_folder(self) -> None:
        """Find out whether the folder holds this run; nothing is written.

        Raises:
            ValueError: it holds a run of another recipe.
        """
        folder, changed = self.folder, {}
        there = folder.config.read_text() if folder.config.exists() else ""
        if there:  # an empty one is what a full disk has left
            changed = differences(there, self.recipe, self._complete)
        self.goes_on_longer = is_longer(changed)
        if changed and not self.goes_on_longer:
            said = "; ".join(f"{key}: {old!r} there, {new!r} now" for key, (old, new) in list(changed.items())[:5])
            raise ValueError(
                f"run_dir {str(folder.path)!r} holds a run of another recipe ({said}): choose another folder"
            )
        self.is_finished = folder.is_finished and not self.goes_on_longer

    def check_folder(self) -> None:
        """Refuse a folder that cannot be trained in; nothing is written.

        Raises:
            OSError: it cannot be written to.
            RuntimeError: another process trains there.
            ValueError: its last checkpoint is damaged.
        """
        if is_first_process():
            self.folder.check_writable()
            refuse_claimed(self.folder)
            refuse_damaged(self.folder.last_checkpoint)

    def _complete(self, recipe: dict[str, Any]) -> str:
        with _quiet(logging.CRITICAL):
            return self.parser.dump(self.parser.parse_object(recipe), skip_none=False)

    def _let_the_model_follow(self) -> None:
        """Give a model that is built from scratch the seed, vocabulary and context of the recipe (jsonargparse cannot
        link into the arguments of a function)."""
        arguments = self.config.model.model.get("init_args", {})
        follows = {"seed": "seed_everything", "vocab_size": "data.vocab_size", "context_length": "data.sequence_length"}
        defaults = inspect.signature(small_moe).parameters
        for name, source in follows.items():
            if name not in arguments:
                continue
            value = self.config[source]
            if arguments[name] not in (value, defaults[name].default):
                raise ValueError(f"model.model.init_args.{name} follows from {source}={value}, got {arguments[name]}")
            arguments[name] = value

    def instantiate_classes(self) -> None:
        """Build model, data and trainer, unless the run is finished."""
        if not self.is_finished:
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the recipe's trainer with the checkpoints and the progress of a run folder; the loggers come later."""
        files = WholeCheckpoints()
        self.progress = RunProgress(self.folder, files)
        checkpoints = StepCheckpoint(self.folder, files, self.config.checkpoint_every, self.config.keep_checkpoints)
        self.trainer_defaults["callbacks"] = [checkpoints, self.progress, *self._bar()]
        if is_fine_tuning(self.config):
            self.trainer_defaults["callbacks"].append(ExpertAgreement())
        kwargs = {"logger": False, "default_root_dir": str(self.folder.path)} | kwargs
        trainer = super().instantiate_trainer(**kwargs)
        let_save(trainer, files)
        return trainer

    def _bar(self) -> list[TrainingBar]:
        """Return the bar of the run, unless the recipe wants none or has its own."""
        callbacks = self.config.trainer.callbacks or []
        has_own = any(callback.class_path.endswith("ProgressBar") for callback in callbacks)
        return [] if has_own or self.config.trainer.enable_progress_bar is False else [TrainingBar()]


class CheckOnly(RecipeCLI):
    """Builds model, data and callbacks without their weights and text, for the checks in their constructors."""

    def compare_with_folder(self) -> None:
        """Leave the folder alone."""

    def check_folder(self) -> None:
        """Leave the folder alone."""

    def instantiate_classes(self) -> None:
        """Build all but the trainer."""
        with torch.device("meta"):
            self.parser.instantiate_classes({key: self.config[key] for key in A_KEY_OF if key != "trainer"})


def check_config(argv: Sequence[str]) -> None:
    """Raise ValueError if ``consistency-reg fit`` would refuse these arguments; nothing is built or written."""
    with _quiet(logging.INFO):  # Lightning says each time which seed it has set
        parse(CheckOnly, argv)


def parse(cli: type[RecipeCLI], argv: Sequence[str]) -> RecipeCLI:
    """Return the recipe that the arguments of ``consistency-reg fit`` describe.

    Raises:
        ValueError: it cannot be trained.
    """
    options = {"prog": "consistency-reg fit", "default_config_files": [str(DEFAULTS)], "exit_on_error": False}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
        return cli(
            CausalMoE,
            TextDataModule,
            args=recipe_words(argv),
            run=False,
            save_config_callback=None,
            parser_kwargs=options,
        )


@contextmanager
def _quiet(level: int) -> Iterator[None]:
    """Log nothing of this level or below."""
    before = logging.root.manager.disable
    logging.disable(max(before, level))
    try:
        yield
    finally:
        logging.disable(before)
