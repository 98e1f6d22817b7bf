"""Hooks of mkdocs: what stands outside of docs/ becomes a page of the site, or a link to the repository.

The Markdown keeps links between files of the repository, which are right on a code host. `PAGES` and the results of the
benchmarks are pages here, every other file is linked to where the repository is (`[project.urls]`).
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
RESULTS = "benchmarks/results"
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?\)")


def mounted() -> dict[str, str]:
    """Return the files outside of docs/ that the site has, by path in the repository, and what they are there."""
    results = sorted(path for path in (ROOT / RESULTS).iterdir() if path.suffix in (".md", ".png"))
    return PAGES | {f"{RESULTS}/{path.name}": f"results/{path.name}" for path in results}


def repository() -> str:
    """Return where the repository is, from pyproject.toml (read by hand: Python 3.10 has no tomllib)."""
    found = re.search(r'^Repository = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    if found is None:
        raise ValueError('pyproject.toml has no Repository = "..." under [project.urls].')
    return found[1]


def rewritten(text: str, source: str, page: str) -> str:
    """Return Markdown with its links as the site has them.

    Args:
        text: the Markdown.
        source: the file it is from, by its path in the repository.
        page: the page it becomes, by its path in docs/.
    """
    pages, home = mounted(), repository()

    def lead(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[1]))
        if not (ROOT / path).exists():
            return link[0]  # mkdocs warns of it
        target = path.removeprefix("docs/") if path.startswith("docs/") else pages.get(path)
        if target is None:
            kind = "tree" if (ROOT / path).is_dir() else "blob"
            return f"]({home}/{kind}/main/{path}{link[2] or ''})"
        return f"]({posixpath.relpath(target, posixpath.dirname(page) or '.')}{link[2] or ''})"

    return LINK.sub(lead, text)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add every table of results to its section, and the repository at the end."""
    assert config.nav is not None
    tables: list[Any] = [{Path(page).stem: page} for page in mounted().values() if page.startswith("results/")]
    section = next(entry["Results"] for entry in config.nav if "Results" in entry)
    section.append({"Every table": [table for table in tables if not next(iter(table.values())).endswith(".png")]})
    config.nav.append({"Repository": repository()})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files of `mounted`."""
    from mkdocs.structure.files import File

    for source, page in mounted().items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the links of a page."""
    name = page.file.src_uri
    if name.startswith("results/"):
        page.meta["hide"] = ["toc"]  # its room is the table's
    if name == "support.md":
        page.meta["search"] = {"boost": 2}  # who looks for the name of a model wants its row
    source = next((path for path, target in mounted().items() if target == name), f"docs/{name}")
    return rewritten(markdown, source, name)
