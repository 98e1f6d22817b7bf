"""The documentation site: every page is in the navigation, every link leads somewhere, and it can be built."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import tokenmerge

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"scripts/{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hooks, commands = _script("docs_hooks"), _script("commands")
CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
# every page of the site, and the file that it is made of
SOURCES = {path.relative_to(DOCS).as_posix(): path.relative_to(ROOT).as_posix() for path in DOCS.rglob("*.md")} | {
    page: source for source, page in hooks.mounted().items() if page.endswith(".md")
}


def _entries(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [entry for part in nav for entry in _entries(next(iter(part.values())) if isinstance(part, dict) else part)]


def test_every_page_is_in_the_navigation_once_and_every_entry_is_a_page() -> None:
    entries = _entries(CONFIG["nav"])
    assert sorted(entries) == sorted(page for page in SOURCES if not page.startswith("results/"))


@pytest.mark.parametrize("page", SOURCES)
def test_relative_links_lead_somewhere(page: str) -> None:
    source = SOURCES[page]
    text = (ROOT / source).read_text()
    home = hooks.repository()
    for found in hooks.LINK.finditer(text):
        assert (ROOT / source).parent.joinpath(found[1]).exists(), f"{source} links to {found[1]}"
    for found in hooks.LINK.finditer(hooks.rewritten(text, source, page)):
        target = (DOCS / page).parent.joinpath(found[1]).resolve().relative_to(DOCS).as_posix()
        assert (DOCS / target).exists() or target in hooks.mounted().values(), f"{page} has no {target} on the site"
    for path in re.findall(rf"\]\({re.escape(home)}/(?:blob|tree)/main/([^)#]+)", hooks.rewritten(text, source, page)):
        assert (ROOT / path).exists()


def test_links_out_of_the_docs_become_pages_or_lead_to_the_repository() -> None:
    text = "[a](../CHANGELOG.md#x) [b](../benchmarks/results/zoo.md) [c](../README.md#y) [d](tune.md) [e](https://a.b/c.md)"
    assert hooks.rewritten(text, "docs/methods.md", "methods.md") == (
        f"[a](changelog.md#x) [b](results/zoo.md) [c]({hooks.repository()}/blob/main/README.md#y) [d](tune.md) "
        "[e](https://a.b/c.md)"
    )
    assert hooks.rewritten("[a](../../docs/tune.md)", "benchmarks/results/x.md", "results/x.md") == "[a](../tune.md)"


def test_the_reference_has_every_public_name() -> None:
    shown = set(re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(), re.MULTILINE))
    wanted = {f"tokenmerge.{name}" for name in tokenmerge.__all__}
    wanted |= {f"tokenmerge.vlm.{name}" for name in tokenmerge.vlm.__all__}
    wanted |= {f"tokenmerge.testing.{name}" for name in tokenmerge.testing._HOLDS} | {"tokenmerge.errors"}
    assert wanted - shown == set()
    for name in shown:  # nothing that is gone
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name


def test_the_page_of_commands_is_what_the_parser_says() -> None:
    page = commands.PAGE.read_text()
    assert page == commands.written(page), "run python scripts/commands.py"
    for name in commands.commands():
        assert f"### tokenmerge {name}\n" in page


def test_the_site_can_be_built_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    python = next(path for path in (ROOT / ".venv-docs/bin/python", Path(sys.executable)) if path.exists())
    can = subprocess.run([python, "-c", "import mkdocs, material, mkdocstrings_handlers.python"], capture_output=True)
    if can.returncode:
        pytest.skip('mkdocs is not installed: `make docs`, or pip install "tokenmerge[docs]"')
    command = [python, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path), "--config-file", "mkdocs.yml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page in tmp_path.rglob("*.html"):
        loaded = re.findall(
            r"<(?:script|img|link|iframe|source)\b[^>]*?\b(?:src|href)=\"?((?:https?:)?//[^\s\">]+)", page.read_text()
        )
        assert loaded == [], page.name
    assert "vit_base_patch16_224" in (tmp_path / "search/search_index.json").read_text()
