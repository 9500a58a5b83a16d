"""The command: one message for every failure, a way to go on after Ctrl-C, help that fits a screen."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from consistency_reg.lab import cli
from consistency_reg.lab.arguments.evaluate import parser


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


@pytest.mark.parametrize("arguments", [[], *([name] for name in cli.COMMANDS)], ids=lambda words: " ".join(words))
def test_help_fits_a_screen_and_has_an_example(capsys, arguments):
    assert cli.main([*arguments, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= (36 if arguments in (["evaluate"], ["offload"]) else 28)  # which have more than 20 options
    assert max(map(len, lines)) <= 100
    assert any("--debug" in line for line in lines)
    assert any(line.startswith("example") for line in lines)
    assert any(line.strip().startswith("consistency-reg ") for line in lines)


def test_rare_options_are_named_in_the_help_and_explained_in_all_of_it(capsys):
    assert cli.main(["evaluate", "--help"]) == 0
    short = capsys.readouterr().out
    assert cli.main(["evaluate", "--help-all"]) == 0
    long = capsys.readouterr().out
    options = [action for action in parser()._actions if action.option_strings]
    assert all(action.option_strings[-1] in short for action in options)
    assert all(f"  {action.option_strings[-1]} " in long for action in options if "-h" not in action.option_strings)
    assert "halved when memory runs out" in long
    assert "halved when memory runs out" not in short


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


ALL_KEYS = "(`consistency-reg fit --print_config` shows every key)"
LOSS = "consistency_reg.LocalConsistencyLoss"
RECIPE = "config.yaml"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--config", "nosuch.yaml"],
            ["there is no recipe nosuch.yaml", "name: baseline, consistency, deployed, finetune"],
        ),
        (["--config", "."], ["config", "not a file"]),
        ([RECIPE], [f"{RECIPE} is no option of fit: a recipe is given with `--config {RECIPE}`"]),
        (["--data", "nosuch.jsonl"], ["there is no file nosuch.jsonl"]),
        (["--data", "a b.txt"], ["the name of a domain, here of the file or folder that --data names", "'a b'"]),
        (["--consistency.wieght", "1"], ["consistency.wieght", ALL_KEYS]),
        (["--whatever=1"], ["whatever", ALL_KEYS]),
        (["--consistency.weight", "high"], ["consistency.weight", "float", "high"]),
        (["--consistency.loss", "NoSuch"], ["consistency.loss", "import path", "NoSuch"]),
        (["--consistency.loss", LOSS, "--consistency.loss.lengths", "3"], ["consistency.loss", LOSS, "'lengths'"]),
        (
            ["--model.balance.init_args.scope", "here"],
            ["model.balance", "scope", "'global', 'batch', 'sequence'", "here"],
        ),
        (["--run_dir", RECIPE], [f"{RECIPE}: Not a directory"]),
        (["--config", "number.yaml"], ["consistency must hold keys, such as consistency.weight, got 3"]),
        (["--checkpoint_every", "0"], ["checkpoint_every must be at least 1, got 0"]),
        (["--keep_checkpoints=-1"], ["keep_checkpoints must be at least 0, got -1"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_in_a_recipe_is_one_line_that_names_it(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    Path(RECIPE).touch()
    Path("a b.txt").touch()
    Path("number.yaml").write_text("consistency: 3")
    assert cli.main(["fit", *arguments]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("consistency-reg: error: ")
    assert not [word for word in said if word not in last], last


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("consistency: {weihgt: 1}", ["consistency", "'weihgt'"]),
        ("grid: {a: 1}", ["grid.a", ALL_KEYS]),
        (
            "model: {model: {init_args: {experts: 3}}}",
            ["model.model", "lab.model.small_moe", "'experts'"],
        ),
        ("[1]", ["config", "[1]"]),
        ("a: [", ["config", "parsing a flow node"]),
        (
            f"consistency: {{loss: {{class_path: {LOSS}, init_args: {{segment_lengths: [a]}}}}}}",
            ["consistency.loss", "segment_lengths", "int", "a"],
        ),
    ],
)
def test_a_mistake_in_a_config_is_one_line_that_names_it(tmp_path, capsys, text, said):
    config = tmp_path / RECIPE
    config.write_text(text)
    assert cli.main(["fit", "--config", str(config), "--run_dir", str(tmp_path / "run")]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("consistency-reg: error: ")
    assert not [word for word in said if word not in last], last
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("place", ["first", "last"])
def test_the_whole_recipe_is_printed_wherever_it_is_asked_for(tmp_path, capsys, place):
    words = ["--config", "quickstart", "--consistency.weight", "0.125"]
    words = ["--print_config", *words] if place == "first" else [*words, "--print_config"]
    assert cli.main(["fit", *words]) == 0
    recipe = yaml.safe_load(capsys.readouterr().out)
    assert recipe["consistency"]["weight"] == 0.125
    assert recipe["trainer"]["val_check_interval"] == 100  # of the recipe
    assert recipe["model"]["model"]["init_args"]["num_experts"] == 32  # of what every recipe starts from
    assert recipe["model"]["weight_decay"] == 0.1  # of the signature
    assert recipe["keep_checkpoints"] == 0


def test_the_version_is_that_of_the_package(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"consistency-reg {version('consistency-reg')}\n"


HEAVY = ("torch", "lightning", "transformers", "datasets", "wandb", "matplotlib", "pandas", "numpy", "yaml", "rich")


@pytest.mark.parametrize(
    "arguments", [["--version"], ["--help"], *([name, "--help"] for name in cli.COMMANDS)], ids=str
)
def test_help_and_version_load_nothing_heavy(arguments):
    """Which is why they take a fraction of a second."""
    code = (
        f"import sys; from consistency_reg.lab import cli; code = cli.main({arguments})\n"
        f"found = {{*{HEAVY}}} & sys.modules.keys()\n"
        "sys.exit(code or str(found) if found else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_module_is_the_command(tmp_path):
    command = [sys.executable, "-m", "consistency_reg", "report", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [f"consistency-reg: error: {tmp_path} is no run: it has no result.json"]
