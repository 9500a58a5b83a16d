"""One HTML page of a report that needs nothing beside itself."""

import base64
import re
from collections.abc import Sequence
from html import escape
from string import Template

from consistency_reg.lab.report.figures import Picture
from consistency_reg.lab.report.runs import Run
from consistency_reg.lab.report.tables import MARKS, Table

MOST_IN_A_LINE = 24  # letters
MADE = "How the runs were made"
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


def page(title: str, tables: Sequence[Table], pictures: Sequence[Picture], runs: Sequence[Run]) -> str:
    """The page: the first table, the figures, the other tables, and how each run was made."""
    first, *others = [_table(table) for table in tables]
    parts = [
        _contents([*(table.title for table in tables), MADE]),
        first,
        *map(_figure, pictures),
        *others,
        _origin(runs),
    ]
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
    kind = ' class="marked"' if row[0].endswith(MARKS) else ""
    return f"<tr{kind}>" + "".join(map(_cell, row)) + "</tr>"


def _cell(text: str) -> str:
    """A short cell stays on one line."""
    kind = ' class="long"' if len(text) > MOST_IN_A_LINE else ""
    return f"<td{kind}>{escape(text)}</td>"


def _origin(runs: Sequence[Run]) -> str:
    """Commands, commits, versions, devices, and the hashes of the text."""
    made = "\n".join(
        f'<tr><td>{escape(run.name)}</td><td class="text"><code>{escape(run.command)}</code></td>'
        f'<td class="text"><code>{escape(run.git_commit)}</code></td>'
        f'<td class="text">{escape(", ".join(f"{name} {version}" for name, version in run.versions.items()))}</td>'
        f'<td class="text">{escape(run.device)}</td></tr>'
        for run in runs
    )
    corpus = runs[0].data.get("corpus", {})
    text = "\n".join(
        f'<tr><td>{escape(domain)}</td><td class="text"><code>{escape(str(sha256))}</code></td></tr>'
        for domain, sha256 in corpus.items()
    )
    return (
        f'{_heading(MADE)}\n<div class="wide"><table>\n'
        f"<tr><th>run</th><th>command</th><th>commit</th><th>versions</th><th>device</th></tr>\n{made}\n</table></div>\n"
        '<h2>Text</h2>\n<div class="wide"><table>\n'
        f"<tr><th>domain</th><th>SHA-256, its first digits</th></tr>\n{text}\n</table></div>"
    )
