"""``consistency-reg fit``: train one recipe into one run folder, through LightningCLI."""

import argparse
import inspect
import logging
import shlex
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from consistency_reg.optional import require

with require("lightning"):
    import yaml
    from jsonargparse import Namespace
    from lightning.pytorch import Trainer
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
    from lightning.pytorch.utilities.exceptions import SIGTERMException

from consistency_reg.callbacks import (
    CacheAwareTraining,
    ConsistencyRegularizer,
    ExpertAgreement,
    RouterAnchor,
    RoutingMonitor,
)
from consistency_reg.callbacks.progress import TrainingBar
from consistency_reg.lab.card import write_card
from consistency_reg.lab.cli import TERMINATED
from consistency_reg.lab.corpus.data import TextDataModule
from consistency_reg.lab.files import write_atomically, write_json
from consistency_reg.lab.finetune import (
    checkpoint_arguments,
    follow_checkpoint,
    is_fine_tuning,
    measure_before,
    vocabulary_digest,
)
from consistency_reg.lab.mistakes import explain, recipe_keys
from consistency_reg.lab.model import count_parameters, small_moe
from consistency_reg.lab.module import CausalMoE, check_warmup
from consistency_reg.lab.pretrained import save_plain
from consistency_reg.lab.provenance import device_name, git_commit, package_versions
from consistency_reg.lab.run_loggers import finish, is_first_process, log_result, run_loggers
from consistency_reg.lab.run_progress import RunProgress, StepCheckpoint

A_KEY_OF = {  # each section of a recipe
    "model": "warmup_steps",
    "data": "sequence_length",
    "trainer": "max_steps",
    "consistency": "weight",
    "anchor": "weight",
    "routing": "strength",
    "monitor": "segment_lengths",
}
DEFAULTS = Path(__file__).with_name("defaults.yaml")


class RecipeCLI(LightningCLI):
    """A recipe: ``model``, ``data``, ``trainer``, ``consistency`` (the regularizer), ``anchor`` (to earlier routers),
    ``routing`` (that knows the cache), ``monitor``, ``run_dir``.

    The seed decides initial weights and data order, so that runs with one seed are pairs.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The callbacks as keys of their own, and values that follow from others."""
        parser.add_lightning_class_args(ConsistencyRegularizer, "consistency")
        parser.add_lightning_class_args(RouterAnchor, "anchor")
        parser.add_lightning_class_args(CacheAwareTraining, "routing")
        parser.add_lightning_class_args(RoutingMonitor, "monitor")
        parser.add_argument("--run_dir", type=str, default="runs/run", help="folder of the run")
        parser.add_argument("--wandb_project", type=str, default="consistency-reg", help="empty for no wandb")
        parser.add_argument("--checkpoint_every", type=int, default=50, help="optimizer steps between two checkpoints")
        parser.link_arguments("seed_everything", "data.seed")
        parser.link_arguments("seed_everything", "routing.seed")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """As LightningCLI does, but errors say what to do."""
        try:
            super().parse_arguments(parser, args)
        except argparse.ArgumentError as error:
            raise ValueError(explain(str(error), recipe_keys(parser))) from error

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
        self._let_the_model_follow()
        if is_fine_tuning(config):
            follow_checkpoint(config)

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

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The recipe's trainer, with the loggers, checkpoints and progress of a run folder."""
        run_dir = Path(self.config.run_dir)
        claim_folder(run_dir, self.parser.dump(self.config, skip_none=False))
        self.progress = RunProgress(run_dir)
        checkpoints = StepCheckpoint(
            run_dir / "checkpoints",
            save_last=True,
            save_top_k=0,
            every_n_train_steps=self.config.checkpoint_every,
            enable_version_counter=False,  # always last.ckpt, which a resumed run looks for
        )
        self.trainer_defaults["callbacks"] = [checkpoints, self.progress, *self._bar()]
        if is_fine_tuning(self.config):
            self.trainer_defaults["callbacks"].append(ExpertAgreement())
        kwargs = {"logger": run_loggers(run_dir, self.config.wandb_project), "default_root_dir": str(run_dir)} | kwargs
        return super().instantiate_trainer(**kwargs)

    def _bar(self) -> list[TrainingBar]:
        """The bar of the run, unless the recipe wants none or has its own."""
        callbacks = self.config.trainer.callbacks or []
        has_own = any(callback.class_path.endswith("ProgressBar") for callback in callbacks)
        return [] if has_own or self.config.trainer.enable_progress_bar is False else [TrainingBar()]


class CheckOnly(RecipeCLI):
    """Builds model, data and callbacks without their weights and text, for the checks in their constructors."""

    def instantiate_classes(self) -> None:
        """All but the trainer."""
        with torch.device("meta"):
            self.parser.instantiate_classes({key: self.config[key] for key in A_KEY_OF if key != "trainer"})


def check_config(argv: Sequence[str]) -> None:
    """Raise ValueError if ``consistency-reg fit`` would refuse these arguments; nothing is built or written."""
    silent = logging.root.manager.disable
    logging.disable(max(silent, logging.INFO))  # Lightning says each time which seed it has set
    try:
        _parse(CheckOnly, argv)
    finally:
        logging.disable(silent)


def _parse(cli: type[RecipeCLI], argv: Sequence[str]) -> RecipeCLI:
    options = {"prog": "consistency-reg fit", "default_config_files": [str(DEFAULTS)], "exit_on_error": False}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
        return cli(
            CausalMoE,
            TextDataModule,
            args=checkpoint_arguments(argv),
            run=False,
            save_config_callback=None,
            parser_kwargs=options,
        )


def claim_folder(run_dir: Path, config: str) -> None:
    """Write ``config.yaml`` into the folder of a new run, by its first process.

    Raises:
        ValueError: it holds a run of another recipe.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / "config.yaml"
    there = path.read_text() if path.exists() else ""  # an empty one is what a full disk has left
    if not there:
        if is_first_process():
            write_atomically(path, config)
        return
    recipes = [yaml.safe_load(text) for text in (there, config)]
    if "routing" not in recipes[0] and not recipes[1]["routing"]["strength"]:
        del recipes[1]["routing"]  # off, and of an earlier version that did not know it
    old, new = map(_flatten, recipes)
    keys = sorted((old.keys() | new.keys()) - {"run_dir"})  # it is this folder, whatever it is called from here
    differences = [key for key in keys if old.get(key) != new.get(key)]
    if differences:
        said = "; ".join(f"{key}: {old.get(key)!r} there, {new.get(key)!r} now" for key in differences[:5])
        raise ValueError(f"run_dir {str(run_dir)!r} holds a run of another recipe ({said}): choose another folder")


def main(argv: Sequence[str]) -> int:
    """Train, or go on with, the run that ``argv`` describes; 0 when it is finished.

    Raises:
        ValueError: the recipe cannot be trained; nothing has been trained then.
        SystemExit: a signal ended the run; the code is 143 after SIGTERM.
    """
    cli = _parse(RecipeCLI, argv)
    run_dir = Path(cli.config.run_dir)
    if (run_dir / "result.json").exists():
        print(f"{run_dir} is finished: see {run_dir / 'result.json'}")
        return 0
    origin = {
        "config": _recipe(cli),
        "versions": package_versions(),
        "git_commit": git_commit(),
        "device": device_name(cli.trainer.strategy.root_device),
    }
    for logger in cli.trainer.loggers:
        logger.log_hyperparams(origin)
    failed = True
    try:
        before = measure_before(cli.trainer, cli.model, cli.datamodule) if is_fine_tuning(cli.config) else {}
        _train(cli, run_dir / "checkpoints" / "last.ckpt")
        cli.trainer.validate(cli.model, datamodule=cli.datamodule, verbose=False)
        if cli.trainer.is_global_zero:
            deployment = _deployment(cli)
            if deployment:
                cli.model.model.config.cache_aware_routing = deployment
            save_plain(cli.model.model, run_dir / "model")
            cli.datamodule.tokenizer.save_pretrained(run_dir / "model")
            result = origin | _result(cli, run_dir, argv) | before | ({"deployment": deployment} if deployment else {})
            files = [write_card(result, run_dir / "model"), run_dir / "config.yaml"]
            log_result(cli.trainer, result, result["name"], files)
            write_json(run_dir / "result.json", result)
        failed = False
    except SIGTERMException as stop:  # Lightning's own have no code, and would pass for success
        raise SystemExit(TERMINATED) from stop
    finally:
        finish(cli.trainer, failed=failed)
    return 0


def _train(cli: RecipeCLI, last: Path) -> None:
    try:
        cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=last if last.exists() else None)
    except RuntimeError as error:
        if "Error(s) in loading state_dict" in str(error):
            raise ValueError(
                f"{last} is a checkpoint of another model: choose another run_dir, or remove it"
            ) from error
        raise


def _deployment(cli: RecipeCLI) -> dict[str, Any]:
    """Return the routing that the model is to be deployed with, as arguments of CacheAwareRouting; empty for none."""
    callbacks: list[Any] = cli.trainer.callbacks  # type: ignore[attr-defined]
    routing = next(one for one in callbacks if isinstance(one, CacheAwareTraining))
    return routing.deployed.settings() if routing.deployed.strength else {}


def _recipe(cli: RecipeCLI) -> dict[str, Any]:
    """The whole recipe, defaults included, as plain values."""
    return yaml.safe_load(cli.parser.dump(cli.config, skip_none=False))


def _result(cli: RecipeCLI, run_dir: Path, argv: Sequence[str]) -> dict[str, Any]:
    total, active = count_parameters(cli.model.model)
    return {
        "name": run_dir.resolve().name,  # that of "." is empty
        "seed": cli.config.seed_everything,
        "command": shlex.join(["consistency-reg", "fit", *argv]),
        "corpus": cli.datamodule.corpus_sha256,
        "vocabulary": vocabulary_digest(cli.datamodule.tokenizer),
        "parameters": {"total": total, "active": active},
        "steps": cli.trainer.global_step,
        "tokens": cli.progress.tokens,
        "tokens_per_s": cli.progress.tokens_per_second,
        "wall_time_s": cli.progress.wall_seconds,
        "wandb_dir": str(run_dir / "wandb") if (run_dir / "wandb").exists() else "",
        "metrics": {
            name: float(value) for name, value in cli.trainer.callback_metrics.items() if name.startswith("val/")
        },
    }


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        key: value
        for name, branch in tree.items()
        for key, value in _flatten(branch, f"{prefix}.{name}".strip(".")).items()
    }
