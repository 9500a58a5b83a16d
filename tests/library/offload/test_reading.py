"""Parts of files, read past the page cache where that can be."""

import errno
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consistency_reg.offload.reading import FileReader

CONTENT = os.urandom(50_001)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("reading") / "file"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def without_direct_io(monkeypatch):
    """A file system that has no O_DIRECT, as many in memory or over a network."""
    whole = os.open

    def refuse(path, flags, *options, **named):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return whole(path, flags, *options, **named)

    monkeypatch.setattr(os, "open", refuse)


@pytest.mark.parametrize("reads", ["direct", "buffered"])
@given(begin=st.integers(0, len(CONTENT) - 1), size=st.integers(1, 20_000))
@settings(max_examples=60, deadline=None)
def test_any_part_is_read_whatever_its_alignment(file, reads, begin, size):
    reader = FileReader(file, reads)
    size = min(size, len(CONTENT) - begin)
    target = bytearray(size)
    reader.read_into(memoryview(target), begin)
    assert bytes(target) == CONTENT[begin : begin + size]
    reader.close()


def test_without_direct_io_pages_are_dropped(file, without_direct_io):
    reader = FileReader(file)
    assert reader.way == "dropped"
    target = bytearray(999)
    reader.read_into(memoryview(target), 12_345)
    assert bytes(target) == CONTENT[12_345 : 12_345 + 999]


def test_a_way_that_is_not_asked_for(file):
    assert FileReader(file, "buffered").way == "buffered"
    with pytest.raises(ValueError, match="reads must be one of direct, buffered, got 'mmap'"):
        FileReader(file, "mmap")


@pytest.mark.parametrize("reads", ["direct", "buffered"])
def test_a_part_behind_the_end_is_an_error(file, reads):
    reader = FileReader(file, reads)
    with pytest.raises(OSError, match=r"file is truncated: it ends \d+ bytes before"):
        reader.read_into(memoryview(bytearray(1000)), len(CONTENT) - 10)


@pytest.mark.parametrize("reads", ["direct", "buffered"])
def test_a_file_that_was_written_to_is_an_error(tmp_path, reads):
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    reader = FileReader(path, reads)
    with path.open("r+b") as file:
        file.write(b"other")
    os.utime(path, ns=(1, 1))  # even where the clock is too coarse to tell
    with pytest.raises(OSError, match="has changed since it was opened"):
        reader.read_into(memoryview(bytearray(10)), 0)
