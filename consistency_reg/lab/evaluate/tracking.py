"""Log what was measured to wandb: a run for each model."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from consistency_reg.lab.evaluate.measure import Evaluation
from consistency_reg.lab.provenance import git_commit, package_versions
from consistency_reg.lab.wandb_login import open_run
from consistency_reg.measures.reading import VALIDATION
from consistency_reg.optional import require


def log_to_wandb(project: str, evaluations: Sequence[Evaluation], pictures: Mapping[str, Path], folder: Path) -> None:
    """Log the numbers and pictures of each model; offline, into ``folder``, where there is no login."""
    with require("wandb"):
        import wandb
    origin = {"versions": package_versions(), "git_commit": git_commit()}
    for one in evaluations:
        config = {"model": one.recording.model, **origin, **one.recording.about}  # a trace has an origin of its own
        name = one.recording.model
        run = open_run(project, folder, name=name, job_type="evaluate", config=config)
        try:
            shown = {f"{VALIDATION}/{name}": value for name, value in one.values.items()}
            run.log(shown | {f"evaluation/{name}": wandb.Image(str(path)) for name, path in pictures.items()})
        finally:
            run.finish()
