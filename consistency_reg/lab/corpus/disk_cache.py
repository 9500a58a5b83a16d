"""Folders on disk that are built once, atomically, and found again by a key of all that they depend on."""

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

ENVIRONMENT_VARIABLE = "CONSISTENCY_REG_CACHE"
CANNOT_WRITE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST, errno.EFBIG
)  # fmt: skip


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """Return ``cache_dir``, else $CONSISTENCY_REG_CACHE, else consistency_reg in $XDG_CACHE_HOME or in ~/.cache."""
    if chosen := cache_dir or os.environ.get(ENVIRONMENT_VARIABLE):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "consistency_reg"


def cache_key(**settings: object) -> str:
    """Return 16 hexadecimal digits that change with any of the settings, which must be what JSON can hold.

    Example:
        >>> cache_key(a=1, b="x") == cache_key(b="x", a=1) != cache_key(a=2, b="x")
        True
    """
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def cached(folder: Path, build: Callable[[Path], None]) -> Path:
    """Return ``folder``, filled by ``build(draft)`` if it is not there yet.

    The draft becomes the folder by one rename, so that nobody ever sees half of it: a build that is cut off leaves
    nothing behind that counts, and of several at the same time the first to end wins.

    Raises:
        OSError: no space, or no right to write; says where and what to set.
    """
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
            draft = Path(scratch) / folder.name
            draft.mkdir()
            build(draft)
            try:
                draft.rename(folder)
            except OSError:
                if not folder.is_dir():
                    raise
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        raise OSError(
            error.errno,
            f"the cache cannot be written to {folder.parent} ({error.strerror or error});"
            f" set cache_dir or ${ENVIRONMENT_VARIABLE} to a folder with space where you may write",
        ) from error
    return folder
