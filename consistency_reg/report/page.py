"""One HTML page of a report that needs nothing beside itself."""

import base64
from collections.abc import Sequence
from html import escape
from string import Template

from consistency_reg.report.runs import Run
from consistency_reg.report.tables import Table

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
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th { white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child, td.text { text-align: left; }
tr.collapsed td { color: #a33; }
img { max-width: 100%; }
p.note { color: #555; margin: .3rem 0; }
code { font-size: .85em; overflow-wrap: anywhere; }
</style>
</head>
<body>
<h1>$title</h1>
$body
</body>
</html>
""")


def page(title: str, tables: Sequence[Table], figures: Sequence[tuple[str, bytes]], runs: Sequence[Run]) -> str:
    """The page: figures (what they show, and their PNG), tables, and how each run was made."""
    parts = [_figure(caption, png) for caption, png in figures]
    parts += [_table(table) for table in tables]
    parts += [_origin(runs)]
    return PAGE.substitute(title=escape(title), body="\n".join(parts))


def _figure(caption: str, png: bytes) -> str:
    data = base64.b64encode(png).decode()
    return f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{data}"></figure>'


def _table(table: Table) -> str:
    header = "".join(f"<th>{escape(name)}</th>" for name in table.header)
    rows = "\n".join(_row(row) for row in table.rows)
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    return (
        f'<h2>{escape(table.title)}</h2>\n<div class="wide"><table>\n<tr>{header}</tr>\n{rows}\n</table></div>\n{note}'
    )


def _row(row: Sequence[str]) -> str:
    kind = ' class="collapsed"' if row[0].endswith("(collapsed)") else ""
    return f"<tr{kind}>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"


def _origin(runs: Sequence[Run]) -> str:
    """Commands, commits, versions, and the hashes of the text."""
    made = "\n".join(
        f'<tr><td>{escape(run.name)}</td><td class="text"><code>{escape(run.command)}</code></td>'
        f'<td class="text"><code>{escape(run.git_commit)}</code></td>'
        f'<td class="text">{escape(", ".join(f"{name} {version}" for name, version in run.versions.items()))}</td></tr>'
        for run in runs
    )
    corpus = runs[0].data.get("corpus", {})
    text = "\n".join(
        f'<tr><td>{escape(domain)}</td><td class="text"><code>{escape(str(sha256))}</code></td></tr>'
        for domain, sha256 in corpus.items()
    )
    return (
        '<h2>How the runs were made</h2>\n<div class="wide"><table>\n'
        f"<tr><th>run</th><th>command</th><th>commit</th><th>versions</th></tr>\n{made}\n</table></div>\n"
        '<h2>Text</h2>\n<div class="wide"><table>\n'
        f"<tr><th>domain</th><th>SHA-256, its first digits</th></tr>\n{text}\n</table></div>"
    )
