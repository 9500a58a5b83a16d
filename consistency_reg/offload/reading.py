"""Read byte ranges of files so that each read costs what the disk costs."""

import mmap
import os
import threading
from pathlib import Path

import numpy as np

READS = ("direct", "buffered")
BLOCKS = (512, 4096)  # bytes that a direct read must be aligned to; the first that the file system takes


class FileReader:
    """Read parts of one file from any thread.

    ``"direct"`` goes past the page cache (``O_DIRECT``): blocks of the file that cover the part go to an aligned buffer
    of the thread, and from there to where they are wanted. On a file system without it pages are dropped after each
    read (``POSIX_FADV_DONTNEED``) without read-ahead. ``"buffered"`` leaves the page cache to the kernel.

    Args:
        path: of the file.
        reads: "direct" or "buffered".
        buffers: each thread's, which readers of several files can share; its own when None.

    Attributes:
        path: of the file.
        way: what is done: "direct", "dropped" (read through the page cache and dropped there) or "buffered".
        block: bytes that a read is aligned to.

    Raises:
        ValueError: another value of ``reads``.
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path, reads: str = "direct", buffers: threading.local | None = None) -> None:
        if reads not in READS:
            raise ValueError(f"reads must be one of {', '.join(READS)}, got {reads!r}")
        self.path = path
        self._buffers = threading.local() if buffers is None else buffers
        self.block, self.way, self._file = 1, "buffered", -1
        if reads == "direct":
            self._open_direct()
        if self._file < 0:
            self._file = os.open(path, os.O_RDONLY)
            self.way = "dropped" if reads == "direct" and hasattr(os, "posix_fadvise") else "buffered"
            if self.way == "dropped":
                os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead
        self._state = self._now()

    def read_into(self, destination: memoryview, offset: int) -> None:
        """Fill ``destination`` with the bytes from ``offset`` on.

        Raises:
            OSError: the disk fails, or the file ends before or is not what it was when it was opened.
        """
        if self._now() != self._state:
            raise OSError(f"{self.path} has changed since it was opened: its weights can no longer be read")
        if self.way == "direct":
            self._read_blocks(destination, offset)
            return
        self._fill(destination, offset, len(destination))
        if self.way == "dropped":
            os.posix_fadvise(self._file, offset, len(destination), os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close the file; further reads fail."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _open_direct(self) -> None:
        try:
            file = os.open(self.path, os.O_RDONLY | os.O_DIRECT)
        except (AttributeError, OSError):  # not Linux, or the file system has none
            return
        buffer = mmap.mmap(-1, max(BLOCKS))
        for block in BLOCKS:
            try:
                os.preadv(file, [memoryview(buffer)[:block]], block if os.fstat(file).st_size > block else 0)
            except OSError:
                continue
            self._file, self.block, self.way = file, block, "direct"
            return
        os.close(file)

    def _read_blocks(self, destination: memoryview, offset: int) -> None:
        begin = offset // self.block * self.block
        end = -(-(offset + len(destination)) // self.block) * self.block
        buffer = self._buffer(end - begin)
        self._fill(memoryview(buffer)[: end - begin], begin, offset + len(destination) - begin)
        part = np.frombuffer(buffer, np.uint8, len(destination), offset - begin)
        np.copyto(np.frombuffer(destination, np.uint8), part)  # which lets other threads run, unlike a memoryview

    def _fill(self, view: memoryview, offset: int, needed: int) -> None:
        """Read until ``needed`` bytes are there; the last block of a file may be shorter than a block."""
        done = 0
        while done < needed:
            read = os.preadv(self._file, [view[done:]], offset + done)
            if read == 0:
                raise OSError(f"{self.path} is truncated: it ends {needed - done} bytes before an expert does")
            done += read

    def _buffer(self, size: int) -> mmap.mmap:
        """Return this thread's page-aligned buffer of at least this size."""
        buffer: mmap.mmap | None = getattr(self._buffers, "own", None)
        if buffer is None or len(buffer) < size:
            buffer = self._buffers.own = mmap.mmap(-1, size)
        return buffer

    def _now(self) -> tuple[int, int]:
        state = os.fstat(self._file)
        return state.st_size, state.st_mtime_ns
