"""The folder of a run: who works in it, and what is kept when a run goes on."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest
from killed import die, dies

from consistency_reg.lab import run_folder
from consistency_reg.lab.run_folder import HANDED_DOWN, Claim, RunFolder, refuse_claimed

CHILD = """
import sys
from pathlib import Path
from consistency_reg.lab.run_folder import Claim, RunFolder
claim = Claim.take(RunFolder(Path(sys.argv[1])))
print("claimed" if claim else "refused", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "run")


def start(folder, *, claim=None):
    options = {} if claim is None else {"pass_fds": [claim.descriptor]}
    environment = {**os.environ, **({} if claim is None else claim.handed_down())}
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        **options,
    )


def test_one_process_at_a_time_works_in_a_folder_and_the_second_is_told_who_does(folder):
    refuse_claimed(folder)
    claim = Claim.take(folder)
    assert Claim.take(folder) is None
    for refusing in (Claim.take_or_refuse, refuse_claimed):
        with pytest.raises(RuntimeError, match=rf"is being trained by process {os.getpid()} on .*, since 20"):
            refusing(folder)
    claim.release()
    claim.release()
    refuse_claimed(folder)
    Claim.take_or_refuse(folder).release()


def test_the_claim_of_a_crashed_owner_is_released(folder):
    def crash():
        assert Claim.take(folder) is not None
        die()

    assert dies(crash) == -signal.SIGKILL
    refuse_claimed(folder)
    Claim.take_or_refuse(folder).release()


def test_what_a_killed_owner_has_left_is_waited_for(folder):
    """Data workers hold the claim of the process that was killed until they see that it is gone."""

    def crash_with_a_child():
        assert Claim.take(folder) is not None
        if os.fork():
            die()
        time.sleep(1.0)

    assert dies(crash_with_a_child) == -signal.SIGKILL
    assert Claim.take(folder) is None
    refuse_claimed(folder)
    Claim.take_or_refuse(folder).release()


def test_a_claim_is_handed_down_and_ends_with_whoever_ends_last(folder):
    claim = Claim.take(folder)
    child = start(folder, claim=claim)
    assert child.stdout.readline() == "claimed\n"
    os.close(claim.descriptor)  # as when this process is killed
    assert Claim.take(folder) is None
    with pytest.raises(RuntimeError, match=f"process {child.pid} on"):
        Claim.take_or_refuse(folder)
    child.communicate()
    Claim.take_or_refuse(folder).release()


def test_a_claim_of_another_folder_is_none_of_this_one(folder, tmp_path, monkeypatch):
    other = Claim.take(RunFolder(tmp_path / "other"))
    monkeypatch.setenv(HANDED_DOWN, str(other.descriptor))
    mine = Claim.take(folder)
    assert mine.descriptor != other.descriptor
    for text in ("nonsense", "-1", "987654"):
        monkeypatch.setenv(HANDED_DOWN, text)
        assert Claim.take(folder) is None


def test_a_file_system_without_locks_is_warned_of(folder, monkeypatch):
    def no_lock(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(run_folder.fcntl, "flock", no_lock)
    with pytest.warns(UserWarning, match="the file system has no locks"):
        Claim.take(folder).release()


def test_what_was_logged_before_is_kept_without_a_row_that_was_cut_off(folder):
    folder.path.mkdir()
    folder.set_metrics_aside()
    for number, content in enumerate(("step,x\r\n0,1.5\r\n1,2.", "step,x\r\n1,2.5\r\n"), start=1):
        folder.metrics.write_text(content)
        folder.set_metrics_aside()
        assert not folder.metrics.exists()
        kept = (folder.path / f"metrics-{number}.csv").read_text()
        assert kept == ("step,x\n0,1.5\n" if number == 1 else "step,x\n1,2.5\n")


def test_a_result_is_kept_once_when_the_run_goes_on_longer_however_that_is_killed(folder, monkeypatch):
    folder.path.mkdir()
    folder.write_config("a: 1")
    folder.write_result({"steps": 1})
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.rename", die)
        assert dies(folder.set_result_aside) == -signal.SIGKILL
    assert folder.is_finished
    folder.set_result_aside()
    folder.set_result_aside()
    assert not folder.is_finished
    assert [path.name for path in folder.earlier_configs()] == ["config-1.yaml"]
    assert (folder.path / "result-1.json").exists()
    folder.write_config("a: 2")
    folder.write_result({"steps": 2})
    folder.set_result_aside()
    assert [path.read_text() for path in folder.earlier_configs()] == ["a: 1", "a: 2"]
    assert (folder.path / "result-2.json").exists()


def test_a_folder_that_cannot_be_written_is_found_before_it_is(tmp_path):
    RunFolder(tmp_path / "a" / "b").check_writable()
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file"):
        RunFolder(tmp_path / "file" / "run").check_writable()
