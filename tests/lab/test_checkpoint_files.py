"""Checkpoints are whole or not there: killed at each stage of a save, with a full disk, on two file systems."""

import errno
import os

import pytest
import torch
from killed import FILE_SYSTEMS, die, dies, mounted, on_file_system

from consistency_reg.lab import checkpoint_files, files
from consistency_reg.lab.checkpoint_files import WholeCheckpoints, damage, refuse_damaged
from consistency_reg.lab.files import remove_leftovers


def state(step, size=1000):
    return {"global_step": step, "weights": [torch.full((size,), float(step)) for _ in range(20)]}


def save(path, step, **options):
    WholeCheckpoints().save_checkpoint(state(step, **options), path)


def saved_step(path):
    found = torch.load(path, weights_only=True)
    assert all(bool((weights == found["global_step"]).all()) for weights in found["weights"])
    return found["global_step"]


def die_after(calls, original):
    seen = []

    def work(*args):
        seen.append(True)
        return die() if len(seen) > calls else original(*args)

    return work


@pytest.fixture(params=FILE_SYSTEMS)
def last(request, tmp_path):
    with on_file_system(request.param, tmp_path) as folder:
        yield folder / "checkpoints" / "last.ckpt"


@pytest.mark.parametrize(
    ("dying", "calls", "expected"),
    [
        pytest.param("consistency_reg.lab.files._FirstError.write", 0, 1, id="nothing written"),
        pytest.param("consistency_reg.lab.files._FirstError.write", 15, 1, id="half written"),
        pytest.param("os.fsync", 0, 1, id="written"),
        pytest.param("consistency_reg.lab.checkpoint_files.damage", 0, 1, id="on the disk"),
        pytest.param("pathlib.Path.replace", 0, 1, id="read again"),
        pytest.param("consistency_reg.lab.files._sync_folder", 0, 2, id="in its place"),
    ],
)
def test_killed_at_a_stage_of_the_save_the_former_checkpoint_or_the_new_one_is_whole(
    last, dying, calls, expected, monkeypatch
):
    save(last, 1)
    owner, _, name = dying.rpartition(".")
    with monkeypatch.context() as patch:
        if calls:
            patch.setattr(files._FirstError, name, die_after(calls, files._FirstError.write))
        else:
            patch.setattr(dying, die)
        assert dies(save, last, 2) == -9, owner
    assert saved_step(last) == expected
    refuse_damaged(last)
    remove_leftovers(last.parent)
    assert os.listdir(last.parent) == ["last.ckpt"]
    save(last, 3)
    assert saved_step(last) == 3


def test_a_full_disk_is_named_by_its_folder_and_leaves_the_former_checkpoint(tmp_path):
    with mounted(tmp_path / "small", size="400k") as folder:
        last = folder / "last.ckpt"
        save(last, 1)
        with pytest.raises(OSError, match=r"No space left on device: last\.ckpt could not be written") as full:
            save(last, 2, size=10_000)
        assert (full.value.errno, full.value.filename) == (errno.ENOSPC, str(folder))
        assert os.listdir(folder) == ["last.ckpt"]
        assert saved_step(last) == 1


def test_what_cannot_be_read_again_does_not_take_the_place(last, monkeypatch):
    save(last, 1)
    monkeypatch.setattr(checkpoint_files, "damage", lambda path: "bits have flipped")
    with pytest.raises(OSError, match="cannot be read after it was written"):
        save(last, 2)
    assert saved_step(last) == 1
    assert os.listdir(last.parent) == ["last.ckpt"]


@pytest.mark.parametrize("content", [b"", b"x", None], ids=["empty", "no archive", "cut off"])
def test_a_damaged_checkpoint_is_refused_with_the_way_out(tmp_path, content):
    last, other = tmp_path / "last.ckpt", tmp_path / "step=00000001.ckpt"
    save(other, 1)
    last.write_bytes(other.read_bytes()[:-2000] if content is None else content)
    with pytest.raises(ValueError, match=r"last\.ckpt is damaged .*: copy .*step=00000001\.ckpt over it to go on from"):
        refuse_damaged(last)
    other.unlink()
    with pytest.raises(ValueError, match=r"last\.ckpt is damaged .*: remove it to begin anew, with the same command"):
        refuse_damaged(last)


def test_a_flipped_byte_is_seen(tmp_path):
    save(tmp_path / "last.ckpt", 1)
    content = bytearray((tmp_path / "last.ckpt").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "last.ckpt").write_bytes(content)
    assert damage(tmp_path / "last.ckpt")


def test_what_is_held_back_takes_its_place_when_it_is_released(tmp_path):
    checkpoints, last = WholeCheckpoints(), tmp_path / "last.ckpt"
    checkpoints.save_checkpoint(state(1), last)
    with checkpoints.held():
        checkpoints.save_checkpoint(state(2), last)
        checkpoints.save_checkpoint(state(3), last)
    assert saved_step(last) == 1
    assert checkpoints.release() == [last]
    assert saved_step(last) == 3
    with checkpoints.held():
        checkpoints.save_checkpoint(state(4), last)
    checkpoints.discard()
    assert checkpoints.release() == []
    assert saved_step(last) == 3
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_a_relative_and_an_absolute_path_are_one_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoints, last = WholeCheckpoints(), tmp_path / "last.ckpt"
    with checkpoints.held():
        checkpoints.save_checkpoint(state(1), "last.ckpt")
        checkpoints.save_checkpoint(state(2), last)
    assert checkpoints.release() == [last]
    assert saved_step(last) == 2
