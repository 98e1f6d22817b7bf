"""The front door: its names, their documentation, and what importing it costs."""

from __future__ import annotations

import doctest
import importlib
import inspect
import json
import pkgutil
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch

import tokenmerge
from tokenmerge._moved import MOVED, NAMES
from tokenmerge.tuning import clock

MODULES = ["tokenmerge"] + [
    info.name for info in pkgutil.walk_packages(tokenmerge.__path__, "tokenmerge.") if "__main__" not in info.name
]


def test_all_is_sorted_complete_and_small() -> None:
    assert tokenmerge.__all__ == sorted(tokenmerge.__all__) and len(tokenmerge.__all__) <= 25
    public = {
        name for name, value in vars(tokenmerge).items() if not name.startswith("_") and not inspect.ismodule(value)
    }
    # the rest is of tools, which are imported on first use
    assert public == set(tokenmerge.__all__) - set(tokenmerge._LATER)
    for name in tokenmerge._LATER:
        assert getattr(tokenmerge, name).__name__ == name and name in dir(tokenmerge)
    with pytest.raises(AttributeError, match="module 'tokenmerge' has no attribute 'from_pretraind'"):
        tokenmerge.from_pretraind  # noqa: B018


@pytest.mark.parametrize("module", MODULES)
def test_public_things_are_documented(module: str) -> None:
    loaded = importlib.import_module(module)
    assert (loaded.__doc__ or "").strip()
    for name in getattr(loaded, "__all__", []):
        value = getattr(loaded, name)
        if inspect.isfunction(value) or (inspect.isclass(value) and value.__module__.startswith("tokenmerge")):
            if inspect.isclass(value) and value.__module__.startswith("tokenmerge.adapters."):
                continue  # an adapter's text is its `families`
            assert inspect.getdoc(value), f"{module}.{name} has no docstring"


@pytest.mark.parametrize("module", MODULES)
def test_examples_in_docstrings_run(module: str) -> None:
    loaded = importlib.import_module(module)
    result = doctest.testmod(loaded, extraglobs={"torch": torch})
    assert result.failed == 0


def test_importing_loads_torch_and_nothing_else() -> None:
    code = (
        "import sys, tokenmerge; cold = {'timm', 'transformers', 'triton', 'matplotlib', 'rich', 'PIL', 'torchvision'};"
        "found = cold & set(sys.modules); assert not found, found;"
        "import torch; assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = [(page.name, block.split("```")[0]) for page in PAGES for block in page.read_text().split("```python\n")[1:]]


@pytest.mark.parametrize(("page", "example"), EXAMPLES, ids=[f"{page}-{i}" for i, (page, _) in enumerate(EXAMPLES)])
def test_examples_of_the_pages_run(page: str, example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(clock, "_ROUNDS", (2,))  # an example need not wait until its time is certain
    script = ModuleType("__main__")  # as if it were run: what it defines can be pickled
    monkeypatch.setitem(sys.modules, "__main__", script)
    exec(compile(example, page, "exec", dont_inherit=True), vars(script))
    assert vars(script).keys() & {"tokenmerge", "tome"}, "an example that does not use the library"


def test_there_are_examples_to_run() -> None:
    assert {"README.md", "CONTRIBUTING.md", "coming-from-tome.md"} <= {page for page, _ in EXAMPLES}


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("old", sorted(MOVED))
def test_a_module_that_moved_is_found_by_its_old_name(old: str) -> None:
    sys.modules.pop(f"tokenmerge.{old}", None)
    with pytest.warns(DeprecationWarning, match=f"tokenmerge.{old} is tokenmerge.{MOVED[old]} now"):
        module = importlib.import_module(f"tokenmerge.{old}")
    assert module is importlib.import_module(f"tokenmerge.{MOVED[old]}") and not hasattr(module, "MOVED")


# what `__all__` of every module held in 0.5 and 0.6
OLDER = json.loads((Path(__file__).parent / "older_names.json").read_text())


@pytest.mark.parametrize("old", OLDER)
def test_every_older_public_name_works_or_says_what_to_do(old: str) -> None:
    path = f"tokenmerge.{old}".rstrip(".")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of modules that moved: see above
        module = importlib.import_module(path)
    names = NAMES.get(old, {})
    if old == "adapters.timm_vit":  # whose functions became methods
        for name in ("timm_blocks", "timm_layout", "timm_tokens"):
            with pytest.warns(DeprecationWarning, match=rf"{name} is TimmAdapter\..* now"):
                assert callable(getattr(module, name))
        return
    assert names.keys() <= set(OLDER[old]) and not names.keys() & vars(module).keys()
    for name in OLDER[old]:
        if name not in names:
            getattr(module, name)  # where it was, without a warning
    for name in names:
        if " " in NAMES[old][name]:
            text = f"{re.escape(module.__name__)}.{name} is gone: "
            with pytest.warns(DeprecationWarning, match=text), pytest.raises(AttributeError, match=text):
                getattr(module, name)
            continue
        home, _, successor = NAMES[old][name].partition(":")
        with pytest.warns(DeprecationWarning, match=rf"{re.escape(module.__name__)}.{name} is .*{successor} now"):
            found = getattr(module, name)
        assert found is getattr(importlib.import_module(f"tokenmerge.{home}"), successor)


def test_names_that_never_were_are_no_attributes() -> None:
    from tokenmerge.adapters import base

    with pytest.warns(DeprecationWarning, match="Original is Override now"):
        assert base.Original is base.Override
    for module in (base, tokenmerge.tools.models, importlib.import_module("tokenmerge.report.table")):
        with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
            module.Nothing  # noqa: B018


def test_a_module_is_found_by_its_old_name_after_its_new_one() -> None:
    code = (
        "import warnings; warnings.simplefilter('ignore'); import tokenmerge.report.table;"
        "from tokenmerge.tools.results import Progress, as_csv; from tokenmerge.adapters.standins import MAEStandIn"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_module_that_moved_is_an_attribute_of_its_package() -> None:
    import tokenmerge.training

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        assert tokenmerge.training.world.World is importlib.import_module("tokenmerge.training.distributed").World
        with pytest.raises(AttributeError):
            _ = tokenmerge.training.worlds
