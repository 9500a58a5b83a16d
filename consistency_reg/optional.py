"""The one guard of optional imports: a missing package is named together with the extra that brings it."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def require(extra: str) -> Iterator[None]:
    """Guard imports that need an extra: ``ImportError`` names the package and how to install it.

    Example:
        >>> with require("lightning"):
        ...     import a_package_that_is_not_there
        Traceback (most recent call last):
            ...
        ImportError: a_package_that_is_not_there is not installed: pip install 'consistency-reg[lightning]'
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(f"{error.name} is not installed: pip install 'consistency-reg[{extra}]'") from error
