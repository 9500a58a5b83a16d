"""``consistency-reg fit``: train one recipe into one run folder, through LightningCLI."""

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from consistency_reg.optional import require

with require("lightning"):
    import yaml
    from lightning.pytorch.utilities.exceptions import SIGTERMException

from consistency_reg.lab.card import CARD, card
from consistency_reg.lab.cli import TERMINATED
from consistency_reg.lab.files import whole_folder, write_atomically
from consistency_reg.lab.finetune import is_fine_tuning, measure_before, validated, vocabulary_digest
from consistency_reg.lab.model import count_parameters
from consistency_reg.lab.pretrained import save_plain
from consistency_reg.lab.provenance import device_name, git_commit, package_versions
from consistency_reg.lab.recipe_cli import RecipeCLI, check_config, parse
from consistency_reg.lab.recipe_files import DEFAULTS
from consistency_reg.lab.render.terminal import print_verdict
from consistency_reg.lab.run_folder import Claim
from consistency_reg.lab.run_loggers import finish, is_first_process, log_result, run_loggers
from consistency_reg.lab.run_verdict import verdict

__all__ = ["DEFAULTS", "check_config", "main"]


def main(argv: Sequence[str]) -> int:
    """Train or resume the run that ``argv`` describes; return 0 when it is finished.

    Raises:
        ValueError: the recipe cannot be trained; nothing has been written then.
        RuntimeError: another process trains in the folder.
        OSError: the folder cannot be written to, or has no space left; what was saved before is whole.
        SystemExit: a signal ended the run; the code is 143 after SIGTERM.
    """
    cli = parse(RecipeCLI, argv)
    if not cli.is_finished:
        look_at_data(cli)
        with claimed(cli):
            if not cli.is_finished:
                _run(cli, argv)
                _end_with_verdict(cli)
                return 0
    print(f"{cli.folder.path} is finished: see {cli.folder.result}; trainer.max_steps may be raised to train on")
    _end_with_verdict(cli)
    return 0


def _end_with_verdict(cli: RecipeCLI) -> None:
    """Print in the first process what the run saved and cost, and what to try next."""
    if is_first_process():
        print_verdict(verdict(cli.folder))


def look_at_data(cli: RecipeCLI) -> None:
    """Read and check the data in the first process, so that a mistake in it leaves no folder behind.

    Raises:
        ValueError: the data cannot be read or trained on; says where.
    """
    if is_first_process():
        cli.datamodule.prepare_data()
        cli.datamodule.setup("fit")
        cli.datamodule.check_batches(cli.trainer.world_size)


@contextmanager
def claimed(cli: RecipeCLI) -> Iterator[None]:
    """Hold the run folder, which has the recipe in it from now on; of several processes the first holds it for all.

    Raises:
        RuntimeError: another process trains there.
        ValueError: another recipe has come there in the meantime.
        OSError: the folder cannot be written to.
    """
    if not is_first_process():
        yield
        return
    folder = cli.folder
    claim = Claim.take_or_refuse(folder)
    try:
        cli.compare_with_folder()
        if not cli.is_finished:
            folder.tidy()
            if cli.goes_on_longer:
                folder.set_result_aside()
            if cli.goes_on_longer or not folder.config.exists() or not folder.config.read_text():
                folder.write_config(cli.recipe)
        yield
    finally:
        claim.release()


def _run(cli: RecipeCLI, argv: Sequence[str]) -> None:
    trainer, folder = cli.trainer, cli.folder
    trainer.loggers = run_loggers(folder, cli.config.wandb_project)
    origin = {
        "config": yaml.safe_load(cli.recipe),
        "versions": package_versions(),
        "git_commit": git_commit(),
        "device": device_name(trainer.strategy.root_device),
    }
    for logger in trainer.loggers:
        logger.log_hyperparams(origin)
    failed = True
    try:
        before = measure_before(trainer, cli.model, cli.datamodule) if is_fine_tuning(cli.config) else {}
        _train(cli, folder.last_checkpoint)
        trainer.validate(cli.model, datamodule=cli.datamodule, verbose=False)
        if trainer.is_global_zero:
            _publish(cli, argv, origin, before)
        failed = False
    except SIGTERMException as stop:  # Lightning's own have no code, and would pass for success
        raise SystemExit(TERMINATED) from stop
    finally:
        finish(trainer, failed=failed)


def _train(cli: RecipeCLI, last: Path) -> None:
    try:
        cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=last if last.exists() else None)
    except RuntimeError as error:
        if "Error(s) in loading state_dict" in str(error):
            raise ValueError(
                f"{last} is a checkpoint of another model: choose another run_dir, or remove it"
            ) from error
        raise


def _publish(cli: RecipeCLI, argv: Sequence[str], origin: dict[str, Any], before: dict[str, Any]) -> None:
    """Write the model with its card, and last the result, which says that the run is finished."""
    folder, deployment = cli.folder, cli.deployment
    if deployment:
        cli.model.model.config.cache_aware_routing = deployment
    with whole_folder(folder.model) as draft:
        save_plain(cli.model.model, draft)  # merges low-rank updates, which count as parameters until then
        result = origin | _result(cli, argv) | before | ({"deployment": deployment} if deployment else {})
        cli.datamodule.tokenizer.save_pretrained(draft)
        write_atomically(draft / CARD, card(result))
    log_result(cli.trainer, result, result["name"], [folder.model / CARD, folder.config])
    folder.write_result(result)


def _result(cli: RecipeCLI, argv: Sequence[str]) -> dict[str, Any]:
    total, active = count_parameters(cli.model.model)
    folder = cli.folder
    shorter = [yaml.safe_load(config.read_text())["trainer"]["max_steps"] for config in folder.earlier_configs()]
    return {
        "name": folder.name,
        "seed": cli.config.seed_everything,
        "command": shlex.join(["consistency-reg", "fit", *argv]),
        "corpus": cli.datamodule.corpus_sha256,
        "vocabulary": vocabulary_digest(cli.datamodule.tokenizer),
        "parameters": {"total": total, "active": active},
        "steps": cli.trainer.global_step,
        **({"went_on_from": shorter} if shorter else {}),
        "tokens": cli.progress.tokens,
        "tokens_per_s": cli.progress.tokens_per_second,
        "wall_time_s": cli.progress.wall_seconds,
        "wandb_dir": str(folder.wandb) if folder.wandb.exists() else "",
        "metrics": validated(cli.trainer),
    }
