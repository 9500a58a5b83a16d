"""Write tables in Markdown, and keep those of a file in step with committed results."""

import re
from collections.abc import Sequence
from pathlib import Path

from consistency_reg.lab.files import write_atomically
from consistency_reg.lab.render.table import Table

# A table between these two comments is one of the report on that file; the rest of the line is free.
MARKED = re.compile(r"(<!-- report (?P<source>\S+): (?P<title>[^>]+?) -->\n).*?(<!-- end of report -->)", re.DOTALL)
ACTING = re.compile(r"[\\`*\[\]|]")  # letters that Markdown acts on within a cell
ENTITY = re.compile(r"&(?=#?\w+;)")


def markdown(table: Table) -> str:
    """Return the table in Markdown, without its title and note.

    Example:
        >>> print(markdown(Table("Runs", ["run", "SRP"], [["a|b <i>", "44.1"]])), end="")
        | run | SRP |
        |---|---|
        | a\\|b &lt;i> | 44.1 |
    """
    rule = "|" + "---|" * len(table.header) + "\n"
    return _line(table.header) + rule + "".join(map(_line, table.rows))


def document(title: str, tables: Sequence[Table], opening: str = "") -> str:
    """Return a Markdown document: the title, an opening paragraph, and all tables with their titles and notes."""
    parts = [f"## {literal(table.title)}\n\n{markdown(table)}\n{literal(table.note)}\n" for table in tables]
    first = [f"{literal(opening)}\n"] if opening else []
    return f"# {literal(title)}\n\n" + "\n".join([*first, *parts])


def literal(text: str) -> str:
    """Return a text that Markdown shows as it is: no HTML, link, image, emphasis or cell begins in it.

    Example:
        >>> literal("<img src=x> [a](b) &lt;")
        '&lt;img src=x> \\\\[a\\\\](b) &amp;lt;'
    """
    shown = ENTITY.sub("&amp;", ACTING.sub(r"\\\g<0>", text))
    return " ".join(shown.replace("<", "&lt;").splitlines())


def update(path: Path, source: str, tables: Sequence[Table]) -> int:
    """Put tables into a Markdown file between ``<!-- report SOURCE: TITLE -->`` and ``<!-- end of report -->``.

    Args:
        path: of the file; it is written only if something changes.
        source: what the report is on, as the marks name it; marks of others are left alone.
        tables: of the report.

    Returns:
        How many tables the file has of this source.

    Raises:
        ValueError: a mark of this source with a title that no table has; a file without such a mark.
    """
    by_title = {table.title: table for table in tables}
    found = 0

    def replaced(match: re.Match[str]) -> str:
        nonlocal found
        if match["source"] != source:
            return match[0]
        if match["title"] not in by_title:
            raise ValueError(f"{path} asks for the table {match['title']!r} of {source}; there are {list(by_title)}")
        found += 1
        return f"{match[1]}\n{markdown(by_title[match['title']])}\n{match[4]}"

    before = path.read_text()
    after = MARKED.sub(replaced, before)
    if not found:
        raise ValueError(
            f"{path} has no <!-- report {source}: TITLE --> ... <!-- end of report --> to put a table into"
        )
    if after != before:
        write_atomically(path, after)
    return found


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(literal, cells))} |\n"
