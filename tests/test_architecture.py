"""The library never imports the lab: whoever imports the library needs no run folder, corpus or command line."""

import ast
import re

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


def modules():
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def imported_at_once(name, path, known):
    """The modules of ``known`` that importing a module imports: not those within functions or for type checkers."""
    names = set()
    todo = list(ast.parse(path.read_text()).body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        todo += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.relative_to(ROOT)}, line {node.lineno}: imports are absolute"
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & known.keys()
            names.update(submodules if len(submodules) == len(node.names) else {node.module, *submodules})
    packages = {imported.rsplit(".", depth)[0] for imported in names for depth in range(1, imported.count(".") + 1)}
    around = {package for package in packages if name == package or name.startswith(f"{package}.")}
    return sorted(((names | packages) - around - {name}) & known.keys())


def first_cycle(imported):
    """The modules of a cycle, in the order of their imports; None if there is none."""
    done, way = set(), []

    def follow(name):
        if name in way:
            return way[way.index(name) :]
        if name in done:
            return None
        way.append(name)
        found = next(filter(None, map(follow, imported[name])), None)
        way.pop()
        done.add(name)
        return found

    return next(filter(None, map(follow, sorted(imported))), None)


def test_no_module_imports_one_that_imports_it():
    known = modules()
    cycle = first_cycle({name: imported_at_once(name, path, known) for name, path in known.items()})
    assert cycle is None, f"these modules import each other: {' -> '.join([*cycle, cycle[0]])}"


def test_a_cycle_is_found():
    assert first_cycle({"a": ["b"], "b": ["c"], "c": ["b"]}) == ["b", "c"]
    assert first_cycle({"a": ["b", "c"], "b": ["c"], "c": []}) is None


def test_the_page_on_architecture_names_every_room():
    rows = (ROOT / "docs" / "architecture.md").read_text().split("## Rooms")[1].splitlines()
    named = {name for row in rows for name in re.findall(r"`([\w.]+)/?`", row.split("|")[1] if "|" in row else "")}
    there = {path.name for path in PACKAGE.iterdir() if not path.name.startswith("_") and path.suffix in ("", ".py")}
    assert named == there
