"""wandb without a prompt: offline where there is no login."""

import os
from pathlib import Path
from typing import Any, Literal, cast, get_args

from consistency_reg.optional import require

Mode = Literal["online", "offline", "disabled", "shared"]


def open_run(project: str, folder: Path, **options: Any) -> Any:
    """Return a new run of wandb with its files in ``folder``; ``options``: more of ``wandb.init``'s."""
    with require("wandb"):
        import wandb
    whole = folder.absolute()  # wandb's process may have begun in another folder
    return wandb.init(project=project, dir=whole, mode=wandb_mode(), **options)


def wandb_mode() -> Mode | None:
    """Return the ``mode`` for ``wandb.init``: what WANDB_MODE says, else offline without a login; None is wandb's own.

    To be passed on, as wandb reads its environment only once in a process.
    """
    chosen = os.environ.get("WANDB_MODE")
    if chosen is not None:
        return cast(Mode, chosen) if chosen in get_args(Mode) else None
    return None if login_found() else "offline"


def login_found() -> bool:
    """Return whether wandb finds credentials without asking: in its environment, its settings or a netrc file.

    The variable is looked at here too, as wandb reads its environment once in a process.
    """
    with require("wandb"):
        import wandb
    return bool(os.environ.get("WANDB_API_KEY") or wandb.login(prompt=False, verify=False))
