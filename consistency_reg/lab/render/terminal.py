"""Print tables on a terminal with as many whole columns as fit, and on a pipe with all of them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from consistency_reg.lab.render.table import Table, is_marked
from consistency_reg.lab.render.verdict import Verdict
from consistency_reg.optional import require

with require("plots"):
    from rich import box
    from rich.cells import cell_len
    from rich.console import Console, Group, RenderableType
    from rich.table import Table as RichTable
    from rich.text import Text

GAP = 2  # letters between two columns
LEAST_FOR_NAMES = 20  # letters of the first column; longer names go on in the next line
UNLIMITED = 100_000  # letters of a line on a pipe


@dataclass(frozen=True)
class Layout:
    """Holds which columns of a table are shown on a terminal, and how wide.

    Attributes:
        widths: letters of each shown column by its place in the header.
        left_out: names of the columns that there is no room for.
    """

    widths: dict[int, int]
    left_out: list[str]


def print_tables(tables: Iterable[Table], console: Console | None = None) -> None:
    """Print tables one after the other, each with its title and note.

    Args:
        tables: to print.
        console: where to; standard output when None.
    """
    console = console or Console()
    for table in tables:
        print_table(table, console)


def print_table(table: Table, console: Console) -> None:
    """Print a table: on a terminal the columns that fit and a line that names the others, on a pipe every column."""
    whole = not console.is_terminal
    if whole:
        console.width = UNLIMITED
    console.print(drawn(table, console.width, whole=whole), soft_wrap=whole)
    console.print()


def drawn(table: Table, width: int, *, whole: bool = False) -> Group:
    """Return a table as rich draws it: title, the columns that fit, a line that names the others, and the note.

    Args:
        table: to draw.
        width: letters of a line.
        whole: whether no cell takes several lines, as on a pipe.
    """
    placed = layout(table, width, wrap=not whole)
    parts: list[RenderableType] = [Text(table.title, style="bold")] if table.title else []
    parts.append(_grid(table, placed))
    if placed.left_out:
        said = f"no room at {width} letters for: {'; '.join(map(printable, placed.left_out))}"
        parts.append(Text(f"{said} (a wider terminal, a pipe and the files show all)", style="yellow"))
    if table.note:
        parts.append(Text(table.note, style="dim"))
    return Group(*parts)


def print_verdict(verdict: Verdict, console: Console | None = None) -> None:
    """Print the two sentences of a verdict: the last lines of a command."""
    console = console or Console()
    console.print(Text(printable(verdict.found), style="bold"), soft_wrap=not console.is_terminal)
    console.print(Text(printable(verdict.advice)), soft_wrap=not console.is_terminal)


def layout(table: Table, width: int, *, wrap: bool = True) -> Layout:
    """Return which columns of a table have room in a line, and how wide each is.

    No column is narrower than its longest word, so that no number is cut or broken. Only the first column, which says
    what a row is, may break a word that takes more than half of the line. Columns are left out in the order of
    ``table.gives_way``, then from the right.

    Args:
        table: to lay out.
        width: letters of a line.
        wrap: whether cells of several words may take several lines.

    Example:
        >>> table = Table("Runs", ["run", "misses", "SRP"], [["first", "-30.5%", "44.1"]])
        >>> layout(table, 80)
        Layout(widths={0: 5, 1: 6, 2: 4}, left_out=[])
        >>> layout(table, 14)
        Layout(widths={0: 5, 1: 6}, left_out=['SRP'])
    """
    columns = [[printable(row[place]) for row in table.rows] for place in range(len(table.header))]
    whole = [max(map(cell_len, cells), default=0) for cells in columns]
    titles = [printable(name) for name in table.header]
    if not wrap:
        wanted = [max(cell_len(title), cells) for title, cells in zip(titles, whole, strict=True)]
        return Layout(dict(enumerate(wanted)), [])
    needed = [max(map(_longest_word, [title, *cells])) for title, cells in zip(titles, columns, strict=True)]
    needed[0] = min(needed[0], max(LEAST_FOR_NAMES, width // 2), width)
    wanted = [max(need, cells) for need, cells in zip(needed, whole, strict=True)]
    kept: list[int] = []
    used = 0
    for place in _by_importance(table):
        more = needed[place] + (GAP if kept else 0)
        if used + more <= width:
            kept.append(place)
            used += more
    widths = {place: needed[place] for place in sorted(kept)}
    for place in widths:
        more = min(wanted[place] - needed[place], width - used)
        widths[place] += more
        used += more
    return Layout(widths, [name for place, name in enumerate(table.header) if place not in widths])


def printable(text: str) -> str:
    """Return a text that moves no cursor and changes no colour: control characters are shown as question marks.

    Example:
        >>> printable("a\\x1b[2Jb\\n")
        'a?[2Jb?'
    """
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _by_importance(table: Table) -> Sequence[int]:
    """Return the places of the columns, the one that is left out last in front."""
    ranks = {name: len(table.header) + len(table.gives_way) - i for i, name in enumerate(table.gives_way)}
    return sorted(range(len(table.header)), key=lambda place: ranks.get(table.header[place], place) if place else -1)


def _longest_word(text: str) -> int:
    return max(map(cell_len, text.split()), default=0)


def _grid(table: Table, placed: Layout) -> RichTable:
    grid = RichTable(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, GAP // 2, 0, 0))
    for place, width in placed.widths.items():
        title = Text(printable(table.header[place]))
        grid.add_column(title, justify="right" if place else "left", overflow="fold", width=width)
    for row in table.rows:
        cells = [Text(printable(row[place])) for place in placed.widths]
        grid.add_row(*cells, style="red" if is_marked(row) else None)
    return grid
