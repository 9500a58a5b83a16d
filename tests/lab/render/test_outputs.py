"""Where commands write: refused before the work, and without stale pictures."""

import pytest

from consistency_reg.lab.evaluate.figures import NAMES
from consistency_reg.lab.render.outputs import check_writable, write_pictures


def test_a_folder_that_can_be_written_is_left_as_it_was(tmp_path):
    check_writable("--out", tmp_path / "new" / "deep")
    check_writable("--out", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/report"])
def test_a_folder_that_cannot_be_written_is_named_with_the_reason(tmp_path, place):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--out must be a folder that can be written into, got .*: \w+"):
        check_writable("--out", tmp_path / place)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_pictures_of_an_earlier_report_go_and_other_files_stay(tmp_path):
    for name in ("routing_3.png", "srp.png", "routing_mine.png", "notes.txt"):
        (tmp_path / name).write_text("old")
    paths = write_pictures(tmp_path, {"srp": b"new"}, NAMES)
    assert paths == {"srp": tmp_path / "srp.png"}
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "srp.png": "new",
        "routing_mine.png": "old",
        "notes.txt": "old",
    }
