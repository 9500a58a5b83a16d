"""The project itself: style and types hold, the wheel is whole, and it is of use without its extras."""

import subprocess
import sys
import zipfile
from email import message_from_string
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from places import ROOT
from wheels import built_wheel

TOP_LEVEL = {
    *("pyproject.toml", "consistency_reg", "recipes", "tests", "notebooks", "README.md"),
    *("Makefile", "constraints.txt", "docs", "mkdocs.yml", "LICENSE"),
    *("CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff"),
}


def run(*arguments, **options):
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False, **options
    )


@pytest.mark.parametrize(
    "tool", [["ruff", "check"], ["ruff", "format", "--check"], ["mypy"]], ids=["ruff", "format", "mypy"]
)
def test_style_and_types_hold(tool):
    done = run("-m", *tool)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return built_wheel(tmp_path_factory.mktemp("wheel"))


def requirements(name):
    """Return the installed distributions that ``name`` needs without any extra, itself included."""
    found, waiting = {}, [name]
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in found:
            continue
        found[name] = distribution(name)
        needs = [Requirement(need) for need in found[name].requires or ()]
        waiting += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return found.values()


@pytest.fixture(scope="module")
def bare(wheel, tmp_path_factory):
    """Runs code with the wheel, torch, torchmetrics and what these two need, as if nothing else were installed."""
    site = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(site)
    for needed in [*requirements("torch"), *requirements("torchmetrics")]:
        for top in {Path(str(file)).parts[0] for file in needed.files} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(needed.locate_file(top))

    def run_bare(code):
        path = f"import sys; sys.path.insert(0, {str(site)!r})"
        command = [sys.executable, "-I", "-S", "-c", f"{path}\n{code}"]
        return subprocess.run(command, cwd=site, capture_output=True, text=True, check=False)

    return run_bare


def test_the_wheel_holds_the_package_and_needs_torch_and_torchmetrics_alone(wheel):
    archive = zipfile.ZipFile(wheel)
    tops = {name.partition("/")[0] for name in archive.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"consistency_reg"}
    source = {str(path.relative_to(ROOT)) for path in ROOT.glob("consistency_reg/**/*.py")}
    recipes = {f"consistency_reg/lab/{path.relative_to(ROOT)}" for path in ROOT.glob("recipes/**/*.yaml")}
    assert source | recipes <= set(archive.namelist())
    metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    needs = message_from_string(archive.read(metadata).decode()).get_all("Requires-Dist")
    assert sorted(need.split(">=")[0] for need in needs if "extra ==" not in need) == ["torch", "torchmetrics"]


def test_the_package_alone_measures_and_regularizes(bare):
    done = bare(
        "import torch, consistency_reg as c\n"
        "assert 'site' in c.__file__, c.__file__\n"
        "scores = torch.randn(2, 20, 8, requires_grad=True)\n"
        "trace = c.RoutingTrace([scores.topk(2).indices], 8, scores=[scores], logits=[scores])\n"
        "c.LocalConsistencyLoss(segment_lengths=(4,))(trace).backward()\n"
        "print(c.__version__, bool(scores.grad.any()))\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0.1.0", "True"]


@pytest.mark.parametrize(
    ("code", "extra"),
    [
        ("import consistency_reg; consistency_reg.ConsistencyRegularizer", "lightning"),
        ("import consistency_reg; consistency_reg.RoutingMonitor", "lightning"),
        ("from consistency_reg.lab.cli import main; sys.exit(main(['fit', '--config', 'x.yaml']))", "lightning"),
        ("from consistency_reg.lab.cli import main; sys.exit(main(['ablate', 'x.yaml']))", "lightning"),
        ("from consistency_reg.lab.cli import main; sys.exit(main(['report', 'x']))", "plots"),
    ],
)
def test_what_needs_an_extra_names_it(bare, code, extra):
    done = bare(code)
    assert done.returncode != 0
    assert f"pip install 'consistency-reg[{extra}]'" in done.stderr.splitlines()[-1]


def test_the_top_level_stays_small():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("no git checkout")
    tops = {name.partition("/")[0] for name in listed.stdout.splitlines()}
    assert {top for top in tops if not top.startswith(".")} <= TOP_LEVEL


def test_the_two_commands_of_the_makefile_do_what_they_say():
    listed = subprocess.run(["make", "-n", "demo", "test"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "consistency-reg ablate recipes/ablations/demo.yaml" in listed.stdout
    assert "consistency-reg report runs/demo" in listed.stdout
    assert '-m "not slow and not gpu"' in listed.stdout
    assert "make test" in (ROOT / ".ci" / "run").read_text()
