"""Files that are whole or not there, and names that may become file names."""

import contextlib
import csv
import io
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

LEFTOVERS = ".*.part"  # drafts of processes that were killed
SAFE_NAME = re.compile(r"[\w+-][\w.+-]{0,99}")


class Draft:
    """Writes a file next to its place and then moves it there, so that nobody ever sees a part of it.

    A reader, a crash and a full disk find the former file or the new one. Being in the folder of its place, the draft
    is on the same file system, where a rename is one step; the bytes reach the disk before the rename does.

    Args:
        path: where the file is to be.

    Example:
        >>> import tempfile
        >>> place = Path(tempfile.mkdtemp(), "number.txt")
        >>> draft = Draft(place)
        >>> with draft.writing() as file:
        ...     _ = file.write(b"7")
        >>> place.exists()
        False
        >>> draft.commit()
        >>> place.read_text()
        '7'
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.temporary = path.with_name(f".{path.name}.{os.getpid()}.part")

    @contextmanager
    def writing(self, *, durable: bool = True) -> Iterator[IO[bytes]]:
        """Give the file to write to; the draft is removed if that fails.

        Raises:
            OSError: no space, or no right to write; names the folder.
        """
        file = _FirstError()
        try:
            with naming(self.path), open(self.temporary, "wb", buffering=0) as raw:
                yield file.around(raw)
                if durable:
                    os.fsync(raw.fileno())
        except BaseException as error:
            self.discard()
            if file.error is not None and file.error is not error:  # torch.save has an error of its own for it
                with naming(self.path):
                    raise file.error from error
            raise

    def commit(self) -> None:
        """Put the draft in its place; it is removed if that fails."""
        try:
            with naming(self.path):
                self.temporary.replace(self.path)
                _sync_folder(self.path.parent)
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        """Remove the draft."""
        with contextlib.suppress(OSError):
            self.temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Write a file so that a reader, or a crash, sees the former file or the new one, never a part.

    Args:
        path: where it is to be.
        content: of the file; text becomes UTF-8.
        durable: whether to wait until the disk has it, which a file that is renewed every few seconds need not.

    Raises:
        OSError: no space, or no right to write; names the folder.
    """
    draft = Draft(path)
    with draft.writing(durable=durable) as file:
        file.write(content.encode() if isinstance(content, str) else content)
    draft.commit()


def write_json(path: Path, content: Any, *, durable: bool = True) -> None:
    """Write indented JSON, whole or not at all; what JSON does not know becomes a string."""
    write_atomically(path, json.dumps(content, indent=1, default=str), durable=durable)


def csv_text(rows: Iterable[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """Return rows as CSV; the columns are those that any of the rows has when None, and empty where a row lacks them.

    Example:
        >>> csv_text([{"run": "a", "misses": 0.5}, {"run": "b", "note": "x"}]).splitlines()
        ['run,misses,note', 'a,0.5,', 'b,,x']
    """
    rows, text = list(rows), io.StringIO()
    fields = list(dict.fromkeys(name for row in rows for name in row)) if columns is None else columns
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def without_nan(content: Any) -> Any:
    """Return nested lists and dictionaries with None in the place of NaN, which JSON does not know.

    Example:
        >>> without_nan({"srp": [0.5, float("nan")]})
        {'srp': [0.5, None]}
    """
    if isinstance(content, dict):
        return {key: without_nan(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [without_nan(value) for value in content]
    return None if isinstance(content, float) and content != content else content


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give a folder to fill, which takes the place of ``path`` when it is full.

    A folder cannot be exchanged in one step: a reader may find none for a moment, but never one that is half full.

    Raises:
        OSError: no space, or no right to write; names the folder.
    """
    draft, former = (path.with_name(f".{path.name}.{os.getpid()}{end}") for end in (".part", ".former.part"))
    try:
        with naming(path):
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir()
            yield draft
            for file in draft.rglob("*"):
                _sync(file)
            if path.exists():
                shutil.rmtree(former, ignore_errors=True)
                path.rename(former)
            draft.rename(path)
            _sync_folder(path.parent)
    finally:
        for folder in (draft, former):
            shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove the drafts that killed processes have left in a folder that no other process writes to."""
    for draft in folder.glob(LEFTOVERS):
        if draft.is_dir():
            shutil.rmtree(draft, ignore_errors=True)
        else:
            draft.unlink(missing_ok=True)


def check_name(what: str, name: object) -> str:
    """Return a name that may be a file's or a folder's, or part of one.

    Such a name consists of letters, digits and ``. _ + -``, does not begin with a dot, and has at most 100 characters.

    Args:
        what: is named, for the message.
        name: the name; a number becomes its text.

    Raises:
        ValueError: it may not.

    Example:
        >>> check_name("a domain", "c++")
        'c++'
        >>> check_name("a domain", "../x")
        Traceback (most recent call last):
        ValueError: the name of a domain must be of letters, digits and . _ + -, at most 100, and not begin with a dot, got '../x'
    """  # noqa: E501
    if not SAFE_NAME.fullmatch(str(name)):
        raise ValueError(
            f"the name of {what} must be of letters, digits and . _ + -, at most 100, and not begin with a dot, "
            f"got {name!r}"
        )
    return str(name)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an error of the operating system say what could not be written, and where.

    Python names no file in an error of a write, and that of a draft is not the name that a reader knows.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or getattr(error, "named", False):
            raise
        said = f"{error.strerror}: {path.name} could not be written"
        said += " (the former one is untouched)" if path.exists() else ""
        named = OSError(error.errno, said, str(path.parent))
        named.named = True  # type: ignore[attr-defined]
        raise named from error


class _FirstError:
    """Wraps a file and keeps the first error of writing, which its writer may replace by another."""

    def __init__(self) -> None:
        self.error: OSError | None = None
        self._file: IO[bytes] | None = None

    def around(self, file: IO[bytes]) -> Any:
        self._file = file
        return self

    def write(self, content: Any) -> int:
        assert self._file is not None
        view = memoryview(content).cast("B")
        written = 0
        try:
            while written < len(view):  # a raw write may take a part
                written += self._file.write(view[written:]) or 0
        except OSError as error:
            self.error = self.error or error
            raise
        return written

    def flush(self) -> None:
        """Do nothing: the file has no buffer."""


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """Write a folder's renames to the disk, where its file system can do so."""
    with contextlib.suppress(OSError):
        _sync(folder)
