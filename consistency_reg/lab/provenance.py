"""The provenance of a result: the commit, the versions of the packages and the device that decide it."""

import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("consistency-reg", "torch", "lightning", "transformers", "torchmetrics", "datasets", "tokenizers", "wandb")


def git_commit() -> str:
    """Return the commit of the checkout that this runs from, "+changes" if its tree differs; "" outside of one."""
    here = Path(__file__).parents[1]

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *args], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "--", __file__)  # fails where it is installed in another's
        changed = git("status", "--porcelain", "--untracked-files=no", "--", str(here))
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that decide a result; those not installed are left out."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def device_name(device: torch.device | str = "cpu") -> str:
    """Return the name of a GPU, or of this machine's processor: each trains another model of one recipe and seed."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        named = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
    except OSError:  # not Linux
        named = None
    return named[1] if named else platform.processor() or platform.machine()
