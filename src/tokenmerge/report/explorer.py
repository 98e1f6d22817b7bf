"""The explorer's page: photos, and what each way of merging did to them, as one HTML file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from string import Template
from typing import Any

from tokenmerge.report.page import as_page, asset, escaped, paragraphs
from tokenmerge.report.table import html_table
from tokenmerge.report.trace import Trace

__all__ = ["explorer_page", "run_data"]

_GIF = "const gifenc = (() => {\nconst exports = {};\nconst module = { exports };\n%s\nreturn module.exports;\n})();\n"


def run_data(trace: Trace, image: int = 0) -> list[dict[str, Any]]:
    """Return what the page needs of a trace: the pairs of every block, or the leads of one that mixes."""
    return [_block(block, image) for block in trace.blocks]


def _block(block: Any, image: int) -> dict[str, Any]:
    if block.is_mixed:
        groups, kept = block.groups[image], block.kept[image]
        return {"lead": [kept[group].item() if group >= 0 else -1 for group in groups.tolist()]}
    similarity = [None if math.isnan(value) else round(value, 3) for value in block.similarity[image].tolist()]
    return {"gone": block.gone[image].tolist(), "into": block.into[image].tolist(), "similarity": similarity}


def explorer_page(
    title: str, data: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], notes: Sequence[str], facts: Sequence[str]
) -> str:
    """Return the page. `data` is what `pages/explorer.js` reads; `rows` are the figures as a table."""
    body = Template(asset("explorer.html")).substitute(
        title=escaped(title),
        notes=paragraphs(notes, "note"),
        facts=paragraphs(facts),
        table=html_table(rows),
    )
    # a small encoder that is in wide use, with its licence: the browser can then save any view, which Python cannot
    # foresee, and the page grows by 24 kB only
    script = _GIF % asset("gifenc.js") + asset("explorer.js")
    return as_page(title, body, style=asset("explorer.css"), script=script, data=data)
