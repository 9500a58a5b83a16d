"""Hold a table of text cells, and write numbers as text."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from consistency_reg.byte_sizes import show_bytes

MARKS = ("(collapsed)", "(left out)")  # at the end of a row's first cell


@dataclass(frozen=True)
class Table:
    """Holds a table: a title, a header, and rows of text.

    Attributes:
        title: what the table is about.
        header: the name of each column; the first column says what a row is.
        rows: as many cells as the header has.
        note: what the columns and marks mean.
        gives_way: columns that a narrow terminal leaves out before all others, the first of them first.
    """

    title: str
    header: list[str]
    rows: list[list[str]] = field(default_factory=list)
    note: str = ""
    gives_way: tuple[str, ...] = ()


def is_marked(row: Sequence[str]) -> bool:
    """Return whether a row is of something that collapsed or is excluded from comparisons.

    Example:
        >>> is_marked(["srp-0.8 (collapsed)", "71.2"]), is_marked(["srp-0.1", "70.0"])
        (True, False)
    """
    return row[0].endswith(MARKS)


def percent(value: float) -> str:
    """Return a share in percent: 0.4567 -> 45.7."""
    return "" if math.isnan(value) else f"{100 * value:.1f}"


def change(value: float) -> str:
    """Return a relative change in percent with its sign: -0.305 -> -30.5%."""
    return "" if math.isnan(value) else f"{100 * value:+.1f}%"


def points(value: float) -> str:
    """Return a difference of two shares in percentage points: 0.041 -> +4.1."""
    return "" if math.isnan(value) else f"{100 * value:+.1f}"


def number(digits: int) -> Callable[[float], str]:
    """Return a function that shows so many decimal places: number(2)(1.234) -> 1.23."""
    return lambda value: "" if math.isnan(value) else f"{value:.{digits}f}"


def multiple(value: float) -> str:
    """Return a ratio with an x: 1.064 -> 1.06x."""
    return "" if math.isnan(value) else f"{value:.2f}x"


def millions(value: float) -> str:
    """Return a count in millions: 12345678 -> 12.35M."""
    return f"{value / 1e6:.2f}M"


def in_bytes(count: float | None) -> str:
    """Return a number of bytes with a unit; "unknown" for None.

    Example:
        >>> in_bytes(1_234_000), in_bytes(12), in_bytes(None)
        ('1.23 MB', '12 B', 'unknown')
    """
    return "unknown" if count is None else show_bytes(count)


def spread(show: Callable[[float], str], mean: float, low: float, high: float) -> str:
    """Return a mean over seeds with the lowest and the highest; the mean alone where all are shown alike.

    Example:
        >>> spread(change, -0.3, -0.4, -0.2)
        '-30.0% (-40.0 to -20.0)'
    """
    lowest, highest = show(low).rstrip("%"), show(high).rstrip("%")
    return show(mean) if lowest == highest else f"{show(mean)} ({lowest} to {highest})"
