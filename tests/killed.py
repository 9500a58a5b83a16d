"""Real processes that are killed at a chosen place, and file systems to kill them on."""

import os
import signal
import subprocess
from contextlib import contextmanager

import pytest

FILE_SYSTEMS = ("disk", "memory")


def dies(work, *args):
    """Run ``work`` in a process of its own, and return how that ended: 0, or minus the number of the signal."""
    child = os.fork()
    if not child:
        try:
            work(*args)
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die(*_, **__):
    """End this process at once, as a machine does that takes it."""
    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def mounted(folder, size="64m"):
    """Give a file system in memory of its own at ``folder``; skips where one may not mount."""
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


@contextmanager
def on_file_system(kind, tmp_path):
    """Give a folder that is on the file system of the temporary folder ("disk"), or on another ("memory")."""
    if kind == "disk":
        (tmp_path / "disk").mkdir()
        yield tmp_path / "disk"
    else:
        with mounted(tmp_path / "memory") as folder:
            yield folder
