"""Check the folder that a command writes into before it works, and replace its pictures."""

import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from consistency_reg.lab.files import write_atomically


def check_writable(option: str, folder: Path) -> None:
    """Raise ValueError if no file can be made in a folder, which need not exist yet; leave nothing behind.

    Args:
        option: the name that the user knows the folder by, such as "--out".
        folder: where a command is going to write.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"{option} must be a folder that can be written into, got {folder}: {reason}") from error
    finally:
        for place in made:
            if place.is_dir() and not os.listdir(place):
                place.rmdir()


def write_pictures(folder: Path, pictures: Mapping[str, bytes], names: Iterable[str]) -> dict[str, Path]:
    """Write PNGs into a folder, and remove those of earlier reports that these do not replace.

    Args:
        folder: made if it is not there.
        pictures: the PNGs by name, without the ending.
        names: regular expressions of all names that the command's pictures can have; other files are left alone.

    Returns:
        The path of each picture by its name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.png"):
        if path.stem not in pictures and any(re.fullmatch(name, path.stem) for name in names):
            path.unlink()
    paths = {name: folder / f"{name}.png" for name in pictures}
    for name, path in paths.items():
        write_atomically(path, pictures[name])
    return paths
