"""wandb without a prompt: offline where there is no login."""

import configparser
import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast, get_args

from consistency_reg.optional import require

Mode = Literal["online", "offline", "disabled", "shared"]


def open_run(project: str, folder: Path, **options: Any) -> Any:
    """A run of wandb with its files in ``folder``; ``options``: more of ``wandb.init``'s."""
    with require("wandb"):
        import wandb
    whole = folder.absolute()  # wandb's process may have begun in another folder
    return wandb.init(project=project, dir=whole, mode=wandb_mode(), **options)


def wandb_mode() -> Mode | None:
    """The ``mode`` for ``wandb.init``: what WANDB_MODE says, else offline without a login; None leaves it to wandb.

    To be passed on, as wandb reads its environment only once in a process.
    """
    chosen = os.environ.get("WANDB_MODE")
    if chosen is not None:
        return cast(Mode, chosen) if chosen in get_args(Mode) else None
    return None if login_found() else "offline"


def login_found() -> bool:
    """Whether wandb would find credentials without asking: in the environment, in its settings, in a netrc file."""
    settings = _settings()
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or settings.get("api_key"):
        return True
    address = os.environ.get("WANDB_BASE_URL") or settings.get("base_url") or "https://api.wandb.ai"
    host = address.split("//")[-1].split("/")[0]
    places = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    path = next((path for path in map(Path, places) if path.expanduser().exists()), None)
    try:
        return path is not None and netrc.netrc(str(path.expanduser())).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _settings() -> Mapping[str, str]:
    """What ``wandb login`` has written beside the key, such as the address of a server of one's own."""
    folder = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser()
    parser = configparser.ConfigParser()
    try:
        parser.read(folder / "settings")
    except configparser.Error:
        return {}
    return dict(parser["default"]) if parser.has_section("default") else {}
