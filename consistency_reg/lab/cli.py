"""The command ``consistency-reg``; each of its parts loads only when it is used."""

import argparse
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import version

INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM  # as a shell has them
HELP = ("-h", "--help")
COMMANDS = {  # the module that runs each, and what it does
    "fit": ("train", "train one recipe into a run folder"),
    "evaluate": ("evaluate.command", "judge models, and say how large a cache of experts they need"),
    "ablate": ("ablate", "train every cell of a grid of recipes"),
    "cloze": ("cloze.command", "let models choose among continuations of held-out passages"),
    "export": ("gguf.command", "write a model as GGUF for llama.cpp"),
    "offload": ("offload.command", "run models whose experts are read from disk"),
    "price": ("pricing.command", "measure what routing that knows the cache costs and saves"),
    "report": ("report", "compare runs: table, figures, one HTML page"),
    "upcycle": ("upcycle.command", "turn a dense model into a mixture of experts"),
    "workspace": ("workspace", "lay out a wandb project for reading trade-offs"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code. Every failure is one message on standard error."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        if debug:
            traceback.print_exc()
        return _interrupted()
    except SystemExit as stop:  # argparse and LightningCLI have said what is wrong
        if isinstance(stop.__context__, KeyboardInterrupt):  # which Lightning turns into an exit
            return _interrupted()
        if stop.code == TERMINATED:
            return _interrupted(TERMINATED)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Exception as error:
        if debug:
            traceback.print_exc()
        print(f"consistency-reg: error: {_message(error)}", file=sys.stderr)
        return 1


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in COMMANDS:
        if not arguments:
            _parser().print_help(sys.stderr)
            return 2
        _parser().parse_args(arguments)
    command, *rest = arguments
    if not {*HELP} & {*rest} and (rest or command != "fit"):
        run: Callable[[list[str]], int | None] = import_module(f"consistency_reg.lab.{COMMANDS[command][0]}").main
        return run(rest) or 0
    help_of = import_module(f"consistency_reg.lab.arguments.{command}").parser()
    help_of.print_help(sys.stdout if rest else sys.stderr)
    return 0 if rest else 2


def _interrupted(code: int = INTERRUPTED) -> int:
    print("\ninterrupted: run the same command again to resume where it stopped", file=sys.stderr)
    return code


def _message(error: Exception) -> str:
    """Return what the error says; its kind too where what it says alone is no sentence."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    spoken = isinstance(error, ValueError | TypeError | RuntimeError | ImportError | OSError) and str(error)
    return str(error) if spoken else f"{type(error).__name__}: {error} (--debug shows where)"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="consistency-reg",
        description="Train mixture-of-experts language models for local routing consistency.",
        epilog="example:\n  consistency-reg fit --config quickstart --run_dir runs/first\n"
        "  consistency-reg report runs/first\n\nconsistency-reg COMMAND --help says more.",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=16),
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--version", action="version", version=f"consistency-reg {version('consistency-reg')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command, (_, does) in COMMANDS.items():
        commands.add_parser(command, help=does)
    return parser
