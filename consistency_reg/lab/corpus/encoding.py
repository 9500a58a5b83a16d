"""Check that files of text are in UTF-8."""

import codecs
from collections.abc import Iterable
from pathlib import Path

CHUNK = 2**20  # bytes read at once
MARKS = {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}  # how files of other encodings begin


def not_utf8(files: Iterable[Path], most_bytes: int | None = None) -> str | None:
    """Return what is wrong with the first file that is not UTF-8, with its line; None if all are.

    Args:
        files: those that are not here are passed over.
        most_bytes: of each file to look at; all of it when None.

    Example:
        >>> import tempfile
        >>> place = Path(tempfile.mkdtemp(), "menu.txt")
        >>> _ = place.write_bytes("tea\\ncafé".encode("latin-1"))
        >>> print(not_utf8([place]).partition("menu.txt")[2])
        , line 2 is not UTF-8 (byte 0xe9): convert the file, for example with iconv -f LATIN1 -t UTF-8
    """
    for path in files:
        if path.is_file() and (bad := _first_bad_byte(path, most_bytes)) is not None:
            line, byte, encoding = bad
            said = f"convert the file, for example with iconv -f {encoding} -t UTF-8"
            return f"{path}, line {line} is not UTF-8 (byte {byte:#04x}): {said}"
    return None


def _first_bad_byte(path: Path, most_bytes: int | None) -> tuple[int, int, str] | None:
    """Return the line and value of the first byte that is not UTF-8, and what the encoding may be."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    lines, done = 1, 0
    with path.open("rb") as file:
        encoding = MARKS.get(file.read(2), "LATIN1")
        file.seek(0)
        while most_bytes is None or done < most_bytes:
            data = file.read(CHUNK)
            pending = decoder.getstate()[0]
            try:
                decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                return lines + (pending + data).count(b"\n", 0, error.start), error.object[error.start], encoding
            lines, done = lines + data.count(b"\n"), done + len(data)
            if not data:
                return None
    return None
