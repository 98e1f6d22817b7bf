"""An extension of griffe: examples and aligned lists in docstrings are shown as they stand, as code."""

from __future__ import annotations

import re
from typing import Any

import griffe


def fenced(text: str) -> str:
    """Return a docstring with its examples and its aligned lists in fences."""
    parts = re.split(r"\n\s*\n", text)
    for place, part in enumerate(parts):
        kind = "pycon" if part.startswith(">>>") else "text" if len(re.findall(r"\S {3,}\S", part)) > 1 else ""
        if kind:
            parts[place] = f"```{kind}\n{part}\n```"
    return "\n\n".join(parts)


class Fences(griffe.Extension):
    """Applies `fenced` to every docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)
