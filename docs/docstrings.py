"""Let the API reference show doctests below ``Example:`` as code, and roles such as ``:class:`` as plain names."""

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Changes docstrings while they are read; the sources stay as they are."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change one docstring."""
        if obj.docstring is not None:
            text = re.sub(r"^Example:(.*)$", r"Examples:\n    \1", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = re.sub(r":(?:attr|class|data|func|meth|mod):`~?([^`]*)`", r"`\1`", text)
