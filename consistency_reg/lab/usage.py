"""Format the commands' help and their messages about wrong usage."""

import argparse
import textwrap
from typing import Any, NoReturn

WIDTH = 100


class CommandParser(argparse.ArgumentParser):
    """Parses arguments, with a help that fits a screen: a line of usage, one list of arguments, examples as written.

    ``--help`` names the rare options of a command that has some, and ``--help-all`` explains them too.

    Args:
        prog: the words of the command, such as "consistency-reg report".
        options: those of :class:`argparse.ArgumentParser`.

    Example:
        >>> parser = CommandParser("consistency-reg show", epilog="example:\\n  consistency-reg show a")
        >>> _ = parser.add_argument("runs", nargs="+", metavar="RUNS", help="folders")
        >>> print(parser.format_help(), end="")
        usage: consistency-reg show [options] RUNS...
        <BLANKLINE>
        arguments:
          -h, --help  show this help and exit
          --debug     show the traceback of an error
          RUNS        folders
        <BLANKLINE>
        example:
          consistency-reg show a
    """

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog=prog, usage=f"{prog} [options]", formatter_class=_Wide, add_help=False, **options)
        self._arguments = self.add_argument_group("arguments")
        self._rare: dict[argparse.Action, str | None] = {}  # with their help
        self.add_argument("-h", "--help", action="help", help="show this help and exit")
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def add_argument(self, *names: Any, rare: bool = False, **options: Any) -> argparse.Action:
        """Add an argument as argparse does, with options and positional arguments in one list.

        Args:
            names: of the option, or that of the positional argument.
            rare: whether ``--help`` is to name the option without explaining it.
            options: those of :meth:`argparse.ArgumentParser.add_argument`.
        """
        action = self._arguments.add_argument(*names, **options)
        if rare:
            self._rare[action], action.help = action.help, argparse.SUPPRESS
        if not action.option_strings:
            self.usage = f"{self.usage} {action.metavar or action.dest}{'' if action.nargs is None else '...'}"
        return action

    def format_help(self) -> str:
        """Return the help, without a blank line at its end."""
        return super().format_help().rstrip() + "\n"

    def add_help_all(self) -> None:
        """Add ``--help-all``, when all rare options have been added."""
        named = " ".join(action.option_strings[0] for action in self._rare)
        self.add_argument("--help-all", action=_HelpAll, nargs=0, help=f"explain these too: {named}")

    def explain_all(self) -> None:
        """Explain the rare options in the help too."""
        for action, explanation in self._rare.items():
            action.help = explanation

    def error(self, message: str) -> NoReturn:
        """Print what is wrong, and how to see the help."""
        self.exit(2, f"{self.format_usage()}{self.prog}: error: {message}\n`{self.prog} --help` shows an example\n")


class _HelpAll(argparse.Action):
    """Print the help with the rare options."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        assert isinstance(parser, CommandParser)
        parser.explain_all()
        parser.print_help()
        parser.exit()


def integers(text: str) -> list[int]:
    """Return the integers between commas."""
    return [int(value) for value in text.split(",") if value]


def numbers(text: str) -> list[float]:
    """Return the numbers between commas."""
    return [float(value) for value in text.split(",") if value]


def names(text: str) -> list[str]:
    """Return the names between commas."""
    return [value for value in text.split(",") if value]


class _Wide(argparse.RawDescriptionHelpFormatter):
    """Format help that is WIDTH columns wide, and break no name of an option."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36, width=WIDTH)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)
