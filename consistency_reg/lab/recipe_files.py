"""The recipes that come with this package, and the values that every recipe starts from."""

from contextlib import suppress
from pathlib import Path

HERE = Path(__file__).parent
DEFAULTS = HERE / "defaults.yaml"


def shipped() -> Path:
    """Return the folder of the recipes: that of an installed package, or of the checkout that this runs from."""
    installed = HERE / "recipes"
    return installed if installed.is_dir() else HERE.parents[1] / "recipes"


def find_recipe(given: str | Path, kind: str = "") -> Path:
    """Return the file of a recipe that is given by its path or by the name of one that comes with this package.

    A file goes before a name, a name before a folder (its reader says that it is no file).

    Args:
        given: such as ``mine.yaml``, ``recipes/quickstart.yaml`` or ``quickstart``.
        kind: the folder below the recipes in which names are looked up, such as ``ablations``.

    Raises:
        FileNotFoundError: neither; lists the names.

    Example:
        >>> find_recipe("quickstart").name, find_recipe("demo", "ablations").parent.name
        ('quickstart.yaml', 'ablations')
    """
    path = Path(given)
    if path.is_dir():
        with suppress(FileNotFoundError):
            return shipped_recipe(given, kind)
    return path if path.exists() else shipped_recipe(given, kind)


def shipped_recipe(given: str | Path, kind: str = "") -> Path:
    """Return the file of a recipe that comes with this package; arguments and errors as :func:`find_recipe`."""
    known = {found.stem: found for found in sorted((shipped() / kind).glob("*.yaml"))}
    name = str(given).removeprefix("recipes/").removeprefix(f"{kind}/").removesuffix(".yaml")
    if name in known:
        return known[name]
    what = "grid" if kind else "recipe"
    raise FileNotFoundError(f"there is no {what} {given}, nor does one come with this name: {', '.join(known)}")
