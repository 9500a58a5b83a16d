"""One HTML page of a report that needs nothing beside itself."""

import base64
import re
from collections.abc import Sequence
from html import escape
from string import Template

from consistency_reg.lab.render.png import Picture
from consistency_reg.lab.render.table import Table, is_marked

MOST_IN_A_LINE = 24  # letters
PAGE = Template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 84rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
nav { color: #555; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .82em; }
th, td { padding: .25rem .4rem; text-align: right; border-bottom: 1px solid #ddd; }
td { white-space: nowrap; } td.long, td.text { white-space: normal; }
th { vertical-align: bottom; }
th:first-child, td:first-child, td.text { text-align: left; overflow-wrap: anywhere; min-width: 7rem; }
tr.marked td { color: #a33; }
figure { margin: 2rem 0; }
img { max-width: 100%; }
figcaption, p.note { color: #444; margin: .3rem 0; max-width: 60rem; font-size: .9em; }
code { font-size: .85em; overflow-wrap: anywhere; }
</style>
</head>
<body>
<h1>$title</h1>
$body
</body>
</html>
""")


def page(title: str, tables: Sequence[Table], pictures: Sequence[Picture], origin: Sequence[Table]) -> str:
    """Return the page: the first table, the figures, the other tables, and where all comes from."""
    first, *others = map(_table, tables)
    contents = _contents([table.title for table in (*tables, *origin)])
    parts = [contents, first, *map(_figure, pictures), *others, *map(_table, origin)]
    return PAGE.substitute(title=escape(title), body="\n".join(parts))


def _contents(titles: Sequence[str]) -> str:
    return "<nav>" + " · ".join(f'<a href="#{_anchor(title)}">{escape(title)}</a>' for title in titles) + "</nav>"


def _anchor(title: str) -> str:
    return re.sub(r"\W+", "-", title).strip("-").lower()


def _heading(title: str) -> str:
    return f'<h2 id="{_anchor(title)}">{escape(title)}</h2>'


def _figure(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    caption = escape(picture.caption)
    image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
    return f'<figure id="{picture.name}">{image}<figcaption>{caption}</figcaption></figure>'


def _table(table: Table) -> str:
    header = "".join(f"<th>{escape(name)}</th>" for name in table.header)
    rows = "\n".join(_row(row) for row in table.rows)
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    return f'{_heading(table.title)}\n<div class="wide"><table>\n<tr>{header}</tr>\n{rows}\n</table></div>\n{note}'


def _row(row: Sequence[str]) -> str:
    kind = ' class="marked"' if is_marked(row) else ""
    return f"<tr{kind}>" + "".join(map(_cell, row)) + "</tr>"


def _cell(text: str) -> str:
    """A short cell stays on one line."""
    kind = ' class="long"' if len(text) > MOST_IN_A_LINE else ""
    return f"<td{kind}>{escape(text)}</td>"
