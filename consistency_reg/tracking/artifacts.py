"""Log files as artifacts of a wandb run."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from consistency_reg.optional import require


def log_artifact(run: Any, name: str, kind: str, paths: Sequence[Path]) -> None:
    """Log files as one artifact of a wandb run, offline too.

    Args:
        run: what ``wandb.init`` gave.
        name: of the artifact; what wandb does not take in a name becomes "-".
        kind: the artifact's type, such as "report" or "model-card".
        paths: the files; they stand side by side in it.

    Raises:
        FileNotFoundError: a file is not there.
    """
    with require("wandb"):
        import wandb
    artifact = wandb.Artifact(artifact_name(name), type=kind)
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is no file and cannot be logged as a part of {name}")
        artifact.add_file(str(path))
    run.log_artifact(artifact)


def artifact_name(name: str) -> str:
    """Return a name that wandb takes: letters, digits, dots, dashes and underscores, at most 128 of them.

    Example:
        >>> artifact_name("report of runs/demo")
        'report-of-runs-demo'
    """
    return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII)[:128]
