"""Make one self-contained HTML page with charts to explore, tables that sort, and details that a click opens."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from string import Template

from consistency_reg.lab.render.charts import Figure, javascript
from consistency_reg.lab.render.palette import COLOURS, NO_TERM, NO_TERM_ON_DARK, ON_DARK, PATHS
from consistency_reg.lab.render.table import MARKS, Table, is_marked
from consistency_reg.lab.render.verdict import Verdict

MOST_IN_A_LINE = 24  # letters
LONG = ' class="long"'
FACTS_TOLD = 5  # of an item, where the pointer is over it
RUN, CELL = "run:", "cell:"  # how the ids of items begin
TABLE, FIGURE = "table", "figure"  # how anchors begin


@dataclass(frozen=True)
class Item:
    """Describe what a click opens: a run, or a cell with its runs.

    Attributes:
        name: of the run or cell.
        cell: the cell that it belongs to or is.
        group: what the legend shows and hides it by.
        facts: names and texts, the first of them also shown where the pointer is over it.
        measures: a name and a text, and more texts where ``header`` has more columns.
        header: of the measures.
        members: ids of what it consists of, or is compared with.
        members_title: what these are.
    """

    name: str
    cell: str
    group: str
    facts: Sequence[tuple[str, str]]
    measures: Sequence[Sequence[str]] = ()
    header: Sequence[str] = ("", "")
    members: Sequence[str] = ()
    members_title: str = ""


@dataclass(frozen=True)
class Entry:
    """Holds an entry of the legend; one with a group can be switched off."""

    label: str
    colour: str
    shape: str
    group: str = ""
    hollow: bool = False


@dataclass(frozen=True)
class Page:
    """Hold what stands on a page, from top to bottom.

    Attributes:
        title: what the page is.
        about: what it is made of.
        verdict: the two sentences that are read first.
        legend: of all charts.
        tables: the first stands above the figures.
        figures: to explore.
        origin: tables of where all comes from.
        items: what a click opens, by id.
    """

    title: str
    about: str
    verdict: Verdict
    tables: Sequence[Table]
    figures: Sequence[Figure] = ()
    legend: Sequence[Entry] = ()
    origin: Sequence[Table] = ()
    items: Mapping[str, Item] = field(default_factory=dict)


def html(page: Page) -> str:
    """Return the page as one file."""
    first, *others = (_table(table, page.items) for table in page.tables)
    origin = [_table(table, page.items, text=True) for table in page.origin]
    titles = [(page.tables[0].title, TABLE), *((figure.title, FIGURE) for figure in page.figures)]
    titles += [(table.title, TABLE) for table in (*page.tables[1:], *page.origin)]
    charts = {f"{one.name}-{place}": chart.spec for one in page.figures for place, chart in enumerate(one.charts)}
    items = {name: asdict(item) for name, item in page.items.items()}
    data = json.dumps({"charts": charts, "items": items, "told": FACTS_TOLD}, allow_nan=False, separators=(",", ":"))
    return Template(_part("page.html")).substitute(
        title=escape(page.title),
        about=escape(page.about),
        found=escape(page.verdict.found),
        advice=escape(page.verdict.advice),
        style=_style(),
        contents=_contents(titles),
        legend="\n".join(map(_entry, page.legend)),
        body="\n".join([first, *map(_figure, page.figures), *others, *origin]),
        data=data.replace("<", "\\u003c"),
        library=javascript().replace("</script", "<\\/script").replace("<!--", "<\\!--"),
        script=_part("page.js"),
    )


def _part(name: str) -> str:
    return Path(__file__).with_name(name).read_text()


def _style() -> str:
    light, dark = (" ".join(f"--c{i}: {one};" for i, one in enumerate(colours)) for colours in (COLOURS, ON_DARK))
    colours = {"light": light, "dark": dark, "none": NO_TERM, "none_on_dark": NO_TERM_ON_DARK}
    return Template(_part("page.css")).substitute(colours)


def _contents(titles: Sequence[tuple[str, str]]) -> str:
    links = (f'<a href="#{_anchor(title, kind)}">{escape(title)}</a>' for title, kind in titles)
    return f"<nav>{' · '.join(links)}</nav>"


def _anchor(title: str, kind: str) -> str:
    return f"{kind}-" + re.sub(r"\W+", "-", title).strip("-").lower()


def _heading(title: str, kind: str) -> str:
    return f'<h2 id="{_anchor(title, kind)}">{escape(title)}</h2>'


def _entry(entry: Entry) -> str:
    fill = "var(--paper)" if entry.hollow else entry.colour
    drawn = f'<path d="{PATHS[entry.shape]}" fill="{fill}" stroke="{entry.colour}" stroke-width=".25"/>'
    inside = f'<svg viewBox="-1.3 -1.3 2.6 2.6" aria-hidden="true">{drawn}</svg>{escape(entry.label)}'
    if not entry.group:
        return f'<span class="chip">{inside}</span>'
    said = f'data-group="{escape(entry.group)}" aria-pressed="true" title="show or hide"'
    return f'<button type="button" class="chip" {said}>{inside}</button>'


def _figure(figure: Figure) -> str:
    charts = "\n".join(
        f"<div>{f'<h3>{escape(chart.title)}</h3>' if chart.title else ''}"
        f'<div class="chart" data-chart="{figure.name}-{place}"></div></div>'
        for place, chart in enumerate(figure.charts)
    )
    caption = f"<figcaption>{escape(figure.caption)}</figcaption>"
    kind = "charts pairs" if len(figure.charts) % 2 == 0 else "charts"
    inside = f'{caption}<div class="{kind}">\n{charts}\n</div>'
    return f'{_heading(figure.title, FIGURE)}\n<figure id="{figure.name}">{inside}</figure>'


def _table(table: Table, items: Mapping[str, Item], *, text: bool = False) -> str:
    header = "".join(map(_header, table.header))
    rows = "\n".join(_row(row, items, text) for row in table.rows)
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    inside = f"<thead><tr>{header}</tr></thead>\n<tbody>\n{rows}\n</tbody>"
    return f'{_heading(table.title, TABLE)}\n<div class="wide"><table class="data">\n{inside}\n</table></div>\n{note}'


def _header(name: str) -> str:
    return f"<th{LONG if len(name) > MOST_IN_A_LINE / 2 else ''}>{escape(name)}</th>"


def _row(row: Sequence[str], items: Mapping[str, Item], text: bool) -> str:
    name = row[0]
    for mark in MARKS:
        name = name.removesuffix(f" {mark}")
    found = next((start + name for start in (RUN, CELL) if start + name in items), None)
    said = ' class="marked"' if is_marked(row) else ""
    if found:
        item = items[found]
        said += f' data-id="{escape(found)}" data-cell="{escape(item.cell)}" data-group="{escape(item.group)}"'
    return f"<tr{said}>" + "".join(_cell(cell, text) for cell in row) + "</tr>"


def _cell(cell: str, text: bool) -> str:
    """Return a cell; a short one stays on one line."""
    kind = ' class="text"' if text else LONG if len(cell) > MOST_IN_A_LINE else ""
    return f"<td{kind}>{escape(cell)}</td>"
