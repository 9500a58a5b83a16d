"""Build and install the package as its users get it: a wheel, and virtual environments to install it in."""

import os
import subprocess
import sys

from places import ROOT


def built_wheel(folder):
    """Build the wheel of this checkout into a folder, and return its path."""
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


def new_python(folder, *install):
    """Make a virtual environment in a folder, install what is named, and return its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    python = folder / "venv" / "bin" / "python"
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", *map(str, install)], check=True)
    return python


def user_environment():
    """Return the environment without what the tests have set: a path to the checkout, and wandb's mode and service."""
    ours = ("PYTHONPATH", "WANDB_MODE", "WANDB_SERVICE")
    return {name: value for name, value in os.environ.items() if name not in ours}
