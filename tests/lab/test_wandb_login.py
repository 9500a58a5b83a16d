"""Without a login wandb is offline and a command that needs its server says so; a mode that was chosen stays."""

import os
import subprocess
import sys

import pytest

from consistency_reg.lab.wandb_login import wandb_mode
from consistency_reg.lab.workspace import main as workspace_main


def test_the_workspace_command_needs_a_login_and_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(ValueError, match="needs a login: run `wandb login`"):
        workspace_main(["team/project"])
    with pytest.raises(ValueError, match="given as ENTITY/PROJECT, got 'project'"):
        workspace_main(["project"])


FIND_LOGIN = """
from consistency_reg.lab.wandb_login import login_found, wandb_mode
print(login_found(), wandb_mode())
"""


def test_no_login_means_offline_and_a_chosen_mode_stays(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_CONFIG_DIR", "WANDB_BASE_URL", "WANDB_MODE", "WANDB_SERVICE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "logins"))

    def found(**environment):  # in a process of its own, as wandb reads its environment once
        done = subprocess.run(
            [sys.executable, "-c", FIND_LOGIN],
            cwd=tmp_path,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.split()[-2:]

    assert found() == ["False", "offline"]
    (tmp_path / "logins").write_text("machine api.wandb.ai login user password " + 40 * "0")
    assert found() == ["True", "None"]
    assert found(WANDB_BASE_URL="https://wandb.example.org") == ["False", "offline"]  # a login for another server
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode() == "disabled"
