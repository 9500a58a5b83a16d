"""The library never imports the lab: whoever imports the library needs no run folder, corpus or command line."""

import ast

import pytest
from places import ROOT

PACKAGE = ROOT / "consistency_reg"
ENTRY_POINT = PACKAGE / "__main__.py"  # the command itself
LIBRARY = [
    path for path in sorted(PACKAGE.rglob("*.py")) if PACKAGE / "lab" not in path.parents and path != ENTRY_POINT
]


def imports(path):
    """(line, module) of every import of a file, wherever it stands."""
    package = ".".join(path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            within = package.rsplit(".", node.level - 1)[0] if node.level else ""
            base = ".".join(part for part in (within, node.module) if part)
            yield node.lineno, base
            yield from ((node.lineno, f"{base}.{name.name}") for name in node.names)


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_library_never_imports_the_lab(path):
    lab = "consistency_reg.lab"
    found = [f"line {line}: {name}" for line, name in imports(path) if name == lab or name.startswith(f"{lab}.")]
    assert not found, f"{path.relative_to(ROOT)} belongs to the library and imports the lab: {found}"
