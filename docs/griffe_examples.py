"""Lets mkdocstrings know our docstrings' examples: it asks for "Examples"."""

from typing import Any

import griffe


class Examples(griffe.Extension):
    """Rename the sections."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        """Change an object's docstring before it is parsed."""
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
