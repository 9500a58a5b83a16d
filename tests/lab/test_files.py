"""Files of the lab are whole or not there: killed at any moment, and with a full disk."""

import errno
import os
from pathlib import Path

import pytest
from killed import FILE_SYSTEMS, die, dies, mounted, on_file_system

from consistency_reg.lab import files
from consistency_reg.lab.files import LEFTOVERS, check_name, remove_leftovers, whole_folder, write_atomically


@pytest.fixture(params=FILE_SYSTEMS)
def place(request, tmp_path):
    with on_file_system(request.param, tmp_path) as folder:
        yield folder / "file"


@pytest.mark.parametrize(
    ("dying", "expected"),
    [("os.fsync", b"old"), ("pathlib.Path.replace", b"old"), ("consistency_reg.lab.files._sync_folder", b"new")],
)
def test_a_file_is_the_former_or_the_new_one_whenever_its_writer_is_killed(place, dying, expected, monkeypatch):
    write_atomically(place, b"old")
    with monkeypatch.context() as patch:
        patch.setattr(dying, die)
        assert dies(write_atomically, place, b"new") == -9
    assert place.read_bytes() == expected
    remove_leftovers(place.parent)
    assert os.listdir(place.parent) == ["file"]
    write_atomically(place, "newer")
    assert place.read_bytes() == b"newer"


def test_a_folder_is_never_half_full(place, monkeypatch):
    def fill(text, last=lambda: None):
        with whole_folder(place) as draft:
            (draft / "a").write_text(text)
            last()
            (draft / "b").write_text(text)

    fill("old")
    assert dies(fill, "new", die) == -9
    assert {path.read_text() for path in place.iterdir()} == {"old"}
    remove_leftovers(place.parent)
    assert not list(place.parent.glob(LEFTOVERS))
    fill("new")
    assert {path.read_text() for path in place.iterdir()} == {"new"}
    with monkeypatch.context() as patch:
        patch.setattr(files, "_sync_folder", die)
        assert dies(fill, "newest") == -9
    assert {path.name: path.read_text() for path in place.iterdir()} == {"a": "newest", "b": "newest"}


def test_a_full_disk_is_named_and_leaves_the_former_file(tmp_path):
    with mounted(tmp_path / "small", size="64k") as folder:
        write_atomically(folder / "file", b"old")
        with pytest.raises(OSError, match="No space left on device: file could not be written") as full:
            write_atomically(folder / "file", bytes(100_000))
        assert (full.value.errno, full.value.filename) == (errno.ENOSPC, str(folder))
        assert (folder / "file").read_bytes() == b"old"
        assert os.listdir(folder) == ["file"]


@pytest.mark.parametrize("name", ["cpp", "c++", "état", "2024.v1", "a_b-c", 7])
def test_names_that_may_be_a_files(name):
    assert check_name("a domain", name) == str(name)


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "/etc", ".hidden", "a b", "a\n", "x" * 101, "a\0"])
def test_names_that_may_not(name):
    with pytest.raises(ValueError, match="the name of a domain must be of letters"):
        check_name("a domain", name)


def test_a_relative_place_without_a_folder_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_atomically(Path("here"), "x")
    assert Path("here").read_text() == "x"
