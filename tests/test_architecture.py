"""The library never imports the lab, modules import each other one way, and a test is found by its module's name."""

import ast
import re
from pathlib import Path

import pytest
from places import ROOT

from consistency_reg.moved import present_path

PACKAGE = ROOT / "consistency_reg"
ENTRY_POINT = PACKAGE / "__main__.py"  # the command itself
LIBRARY = [
    path for path in sorted(PACKAGE.rglob("*.py")) if PACKAGE / "lab" not in path.parents and path != ENTRY_POINT
]


def imports(path):
    """Yield (line, module) of every import of a file, wherever it stands."""
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
    """Return every module of the package by its dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def imported_at_once(name, path, known):
    """Return the modules of ``known`` that importing a module imports, not those in functions or for type checkers."""
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
    """Return the modules of a cycle, in the order of their imports; None if there is none."""
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


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_imports_by_a_former_path(path):
    assert [(line, name) for line, name in imports(path) if present_path(name) is not None] == []


def tests_of_rooms():
    """Return the tests of rooms as CONTRIBUTING.md has them, by the room's folder within the package."""
    table = (ROOT / "CONTRIBUTING.md").read_text().split("| room | tests |")[1].split("\n\n")[0]
    rows = [row.split("|")[1:3] for row in table.splitlines()[2:]]
    return {
        room.strip(" `").removeprefix("consistency_reg/").rstrip("/"): re.findall(r"`([\w/]*test_\w+\.py)`", tests)
        for room, tests in rows
    }


def test_a_module_is_tested_by_a_file_of_its_name_or_with_its_room():
    rooms = tests_of_rooms()
    missing = [name for tests in rooms.values() for name in tests if not (ROOT / "tests" / name).exists()]
    assert missing == []
    named = set()
    for path in PACKAGE.rglob("*.py"):
        module = path.relative_to(PACKAGE)
        in_tests = module if module.parts[0] == "lab" else Path("library", module)
        test = in_tests.with_name(f"test_{path.name}")
        if (ROOT / "tests" / test).exists():
            named.add(str(test))
        elif not path.name.startswith("__"):
            room = "" if module.parent == Path() else str(module.parent)
            assert rooms.get(room), f"{module} has no {test}, and its room none of CONTRIBUTING.md's tests of rooms"
    of_rooms = {name for tests in rooms.values() for name in tests}
    there = {str(test.relative_to(ROOT / "tests")) for test in (ROOT / "tests").glob("l*/**/test_*.py")}
    assert there - named - of_rooms == set(), "tests of no module: name the file after one, or add it to its room's row"


def test_the_page_on_architecture_names_every_room():
    rows = (ROOT / "docs" / "architecture.md").read_text().split("## Rooms")[1].splitlines()
    named = {name for row in rows for name in re.findall(r"`([\w.]+)/?`", row.split("|")[1] if "|" in row else "")}
    there = {path.name for path in PACKAGE.iterdir() if not path.name.startswith("_") and path.suffix in ("", ".py")}
    assert named == there
