"""Log the measures of offloaded models to wandb: a run for each model."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from consistency_reg.lab.offload.measure import Measured
from consistency_reg.lab.offload.show import COLUMNS
from consistency_reg.lab.provenance import git_commit, package_versions
from consistency_reg.lab.wandb_login import open_run
from consistency_reg.optional import require


def log_to_wandb(project: str, measured: Sequence[Measured], pictures: Mapping[str, Path], folder: Path) -> None:
    """Log numbers, pictures, texts and a table of tokens of each model; offline, into ``folder``, without a login."""
    with require("wandb"):
        import wandb
    origin = {"versions": package_versions(), "git_commit": git_commit()}
    for one in measured:
        config = {"model": one.name, **origin, **one.about}
        run = open_run(project, folder, name=one.name, job_type="offload", config=config)
        try:
            numbers = {f"offload/{name}": value for name, value in one.numbers.items() if not math.isnan(value)}
            rows = [[row[column] for column in COLUMNS] for row in one.token_rows()]
            texts = [[number, text] for number, text in enumerate(one.texts)]
            run.log(
                numbers
                | {f"offload/{name}": wandb.Image(str(path)) for name, path in pictures.items()}
                | {"offload/tokens": wandb.Table(columns=list(COLUMNS), data=rows)}
                | {"offload/texts": wandb.Table(columns=["prompt", "text"], data=texts)}
            )
        finally:
            run.finish()
