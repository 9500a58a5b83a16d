"""The command: one message for every failure, a way to go on after Ctrl-C, help that fits a screen."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from consistency_reg.lab import cli


@pytest.fixture
def command(monkeypatch):
    """Makes ``consistency-reg report`` do what a test wants."""

    def install(action):
        monkeypatch.setitem(sys.modules, "consistency_reg.lab.report", SimpleNamespace(main=action))

    return install


def fail_with(error):
    def action(arguments):
        raise error

    return action


def test_arguments_go_to_the_command_and_its_code_comes_back(command):
    seen = []
    command(lambda arguments: seen.append(arguments) or 3)
    assert cli.main(["report", "runs/a", "--out", "x"]) == 3
    assert seen == [["runs/a", "--out", "x"]]
    command(lambda arguments: None)
    assert cli.main(["report"]) == 0


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("weight must be >= 0, got -1"), "weight must be >= 0, got -1"),
        (PermissionError(13, "Permission denied", "runs/a"), "runs/a: Permission denied"),
        (ImportError("wandb is not installed: pip install 'consistency-reg[wandb]'"), "consistency-reg[wandb]"),
        (KeyError("x"), "KeyError: 'x' (--debug shows where)"),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_a_failure_is_one_message_and_a_traceback_only_when_asked_for(command, capsys, error, message):
    command(fail_with(error))
    assert cli.main(["report"]) == 1
    output = capsys.readouterr()
    assert output.err.startswith("consistency-reg: error: ")
    assert message in output.err
    assert "Traceback" not in output.err + output.out
    for arguments in (["--debug", "report"], ["report", "--debug"]):
        assert cli.main(arguments) == 1
        assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_says_how_to_go_on(command, capsys):
    command(fail_with(KeyboardInterrupt()))
    assert cli.main(["report"]) == 130
    assert "run the same command again" in capsys.readouterr().err

    def lightning(arguments):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)

    command(lightning)
    assert cli.main(["report"]) == 130
    assert "run the same command again" in capsys.readouterr().err


def test_termination_says_how_to_go_on(command, capsys):
    command(fail_with(SystemExit(143)))
    assert cli.main(["report"]) == 143
    assert "run the same command again" in capsys.readouterr().err


@pytest.mark.parametrize(("code", "expected"), [(None, 0), (0, 0), (2, 2), ("no such key", 1)])
def test_an_exit_inside_a_command_is_its_code(command, capsys, code, expected):
    command(fail_with(SystemExit(code)))
    assert cli.main(["report"]) == expected
    assert ("no such key" in capsys.readouterr().err) == (code == "no such key")


@pytest.mark.parametrize("arguments", [[], *([name] for name in cli.MODULES)], ids=lambda words: " ".join(words))
def test_help_fits_a_screen_and_has_an_example(capsys, arguments):
    assert cli.main([*arguments, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= (36 if arguments in (["evaluate"], ["offload"]) else 24)  # which have some 20 options
    assert max(map(len, lines)) <= 100
    assert any("--debug" in line for line in lines)
    assert any(line.startswith("example") for line in lines)
    assert any(line.strip().startswith("consistency-reg ") for line in lines)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["fit"],
        ["ablate"],
        ["report"],
        ["report", "x", "--nonsense"],
        ["evaluate", "--max-tokens", "x"],
    ],
)
def test_wrong_usage_is_said_without_a_traceback(capsys, arguments):
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("usage: consistency-reg")
    assert "example" in error or "choose from" in error
    assert "Traceback" not in error


ALL_KEYS = "`consistency-reg fit --print_config` shows every key"
LOSS = "consistency_reg.LocalConsistencyLoss"
RECIPE = "config.yaml"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "nosuch.yaml"], "--config: there is no recipe '{folder}/nosuch.yaml'"),
        (["--config", "."], "--config: a recipe is a file, which is not true of '{folder}/.'"),
        (
            [RECIPE],
            f"{RECIPE} is no option of fit: a recipe is given with `--config {RECIPE}`, a key with `--KEY VALUE`",
        ),
        (
            ["--consistency.wieght", "1"],
            f"a recipe has no key consistency.wieght; is consistency.weight meant? {ALL_KEYS}",
        ),
        (["--whatever=1"], f"a recipe has no key whatever; {ALL_KEYS}"),
        (["--consistency.weight", "high"], "consistency.weight: must be of type float, got 'high'"),
        (["--consistency.loss", "NoSuch"], f"consistency.loss: must be the import path of a class, such as {LOSS}"),
        (
            ["--consistency.loss", LOSS, "--consistency.loss.lengths", "3"],
            f"consistency.loss: {LOSS} has no option 'lengths'",
        ),
        (
            ["--model.balance.init_args.scope", "here"],
            "model.balance: scope of consistency_reg.losses.LoadBalanceLoss must be one of 'global', 'batch', "
            "'sequence', got 'here'",
        ),
        (["--run_dir", RECIPE], f"{RECIPE}: File exists"),
        (["--config", "number.yaml"], "consistency must hold keys, such as consistency.weight, got 3"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_in_a_recipe_is_said_in_a_sentence(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path(RECIPE).touch()
    Path("number.yaml").write_text("consistency: 3")
    assert cli.main(["fit", *arguments]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"consistency-reg: error: {message.format(folder=tmp_path)}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("consistency: {weihgt: 1}", "a recipe has no key consistency.weihgt; is consistency.weight meant?"),
        ("grid: {a: 1}", f"a recipe has no key grid.a; {ALL_KEYS}"),
        (
            "model: {model: {init_args: {experts: 3}}}",
            "model.model: consistency_reg.lab.model.small_moe has no option 'experts'",
        ),
        ("[1]", "--config takes a file of YAML keys and values: got [1]"),
        ("a: [", "--config takes a file of YAML keys and values: while parsing"),
        (
            f"consistency: {{loss: {{class_path: {LOSS}, init_args: {{segment_lengths: [a]}}}}}}",
            f"consistency.loss: segment_lengths of {LOSS} must be of type int, got 'a'",
        ),
    ],
)
def test_a_mistake_in_a_config_is_said_in_a_sentence(tmp_path, capsys, text, message):
    config = tmp_path / RECIPE
    config.write_text(text)
    assert cli.main(["fit", "--config", str(config), "--run_dir", str(tmp_path / "run")]) == 1
    assert f"consistency-reg: error: {message}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_command_loads_only_what_it_runs():
    code = (
        "import sys; from consistency_reg.lab import cli; code = cli.main(['--help'])\n"
        "heavy = {'lightning', 'transformers', 'datasets', 'wandb', 'matplotlib', 'pandas'} & sys.modules.keys()\n"
        "sys.exit(code or str(heavy) if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_module_is_the_command(tmp_path):
    command = [sys.executable, "-m", "consistency_reg", "report", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [f"consistency-reg: error: {tmp_path} is no run: it has no result.json"]
