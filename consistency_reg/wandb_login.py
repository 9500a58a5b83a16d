"""wandb without a prompt: offline where there is no login."""

import netrc
import os


def offline_without_login() -> None:
    """Set ``WANDB_MODE=offline`` unless a mode is chosen or a login is found."""
    if "WANDB_MODE" not in os.environ and not login_found():
        os.environ["WANDB_MODE"] = "offline"


def login_found() -> bool:
    """Whether wandb would find an API key without asking."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
