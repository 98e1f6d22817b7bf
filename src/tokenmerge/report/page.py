"""One HTML file that holds everything and needs no network: the one template, and the one place that escapes."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from importlib.resources import files
from string import Template
from typing import Any

__all__ = ["as_page", "asset", "escaped", "paragraphs"]


def escaped(text: object) -> str:
    """Return a text so that HTML shows it literally, also in an attribute; bytes of file names that are no text too."""
    return html.escape(str(text).encode("utf-8", "backslashreplace").decode())


def paragraphs(texts: Sequence[str], kind: str = "") -> str:
    """Return plain sentences as paragraphs, of a class if one is given."""
    mark = f' class="{kind}"' if kind else ""
    return "\n".join(f"<p{mark}>{escaped(text)}</p>" for text in texts)


def asset(name: str) -> str:
    """Return a file of `report/pages`."""
    return (files("tokenmerge.report") / "pages" / name).read_text(encoding="utf-8")


def as_page(title: str, body: str, *, style: str, script: str = "", data: Any = None) -> str:
    """Return a page. `body` is HTML, made with `escaped`; `data` becomes JSON in the element `data`.

    `style` comes after `pages/base.css`, which all pages share. The page's policy allows these styles and this script,
    by their digests, and pictures that are in the page: no other script runs, and nothing is loaded or sent, whatever
    names of files and classes hold.
    """
    style, script = f"\n{asset('base.css').strip()}\n{style.strip()}\n", f"\n{script.strip()}\n" if script else ""
    policy = (
        f"default-src 'none'; img-src data: blob:; style-src {_digest(style)}; "
        f"script-src {_digest(script) if script else chr(39) + 'none' + chr(39)}; base-uri 'none'; form-action 'none'"
    )
    return Template(asset("page.html")).substitute(
        policy=policy,
        title=escaped(title),
        style=style,
        body=body,
        data="" if data is None else f'<script type="application/json" id="data">{_embedded(data)}</script>',
        script=f"<script>{script}</script>" if script else "",
    )


def _embedded(data: Any) -> str:
    """Return JSON that cannot end the script element that it stands in."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
