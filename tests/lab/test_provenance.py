"""What a result says it came from."""

import importlib.util
import shutil
import subprocess

import pytest

from consistency_reg.lab import provenance


@pytest.fixture
def project(tmp_path):
    """A repository with the package in its virtual environment, which it ignores."""

    def git(*arguments):
        return subprocess.run(["git", "-C", tmp_path, *arguments], check=True, capture_output=True, text=True).stdout

    package = tmp_path / "venv" / "consistency_reg" / "lab"
    package.mkdir(parents=True)
    shutil.copy(provenance.__file__, package)
    (tmp_path / ".gitignore").write_text("venv\n")
    git("init")
    git("add", ".")
    git("-c", "user.name=me", "-c", "user.email=me@here", "commit", "-m", "mine")
    return package / "provenance.py", git


def commit_of(path):
    """What the package in another place says."""
    spec = importlib.util.spec_from_file_location("elsewhere", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.git_commit()


def test_a_commit_is_of_the_package_not_of_the_project_it_is_installed_in(project):
    path, git = project
    assert commit_of(path) == ""
    git("add", "--force", path)
    git("-c", "user.name=me", "-c", "user.email=me@here", "commit", "-m", "a copy of it")
    commit = git("rev-parse", "--short=12", "HEAD").strip()
    assert commit_of(path) == commit
    with path.open("a") as file:
        print("# changed", file=file)
    assert commit_of(path) == f"{commit}+changes"
