"""The house rules: who imports whom, how large files are, and that every plug-in is listed."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tokenmerge import adapters, kernels, methods

SRC = Path(adapters.__file__).parent.parent
FILES = sorted(SRC.rglob("*.py"))
HOSTS = {
    "timm",
    "transformers",
    "torchvision",
    "open_clip",
    "diffusers",
    "matplotlib",
    "rich",
    "PIL",
    "safetensors",
    "triton",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "openvino",
    "datasets",
    "webdataset",
    "braceexpand",
    "av",
    "torchcodec",
    "tensorboard",
    "pyarrow",
    "fsspec",
    "ray",
}
# from the ground up: a room imports only what stands below it, so that no import climbs and none goes in a circle
FLOORS = (
    "_version",
    "_moved",
    "testing.models",  # know nothing of the library
    "errors",
    "fields",
    "files",
    "_torch",
    "kernels",
    "plan",
    "matching",
    "importance",
    "functional",
    "schedule",
    "methods",
    "_intercept",
    "adapters",
    "config",
    "about",
    "_runtime",
    "report",
    "handle",
    "assets",
    "data",
    "measure",
    "tuning",
    "api",
    "",  # the front door
    "testing",
    "tools",
    "vlm",
    "compat",
    "training",
    "batch",
    "cli",
)
# these are on no floor: they import nothing before something of theirs is asked for
LAZY = ("tokenmerge.tools", "tokenmerge.testing", "tokenmerge.vlm", "tokenmerge.batch")


def _room(path: Path) -> str:
    parts = path.relative_to(SRC).with_suffix("").parts
    return "" if parts[0] == "__init__" else _room_of(*parts)


def _room_of(*parts: str) -> str:
    """The room of a module by the parts of its name: its folder, or a folder in that with a floor of its own."""
    inner = ".".join(parts[:2])
    return inner if inner in FLOORS else parts[0]


def _imports(path: Path) -> list[tuple[str, bool]]:
    """Every imported module, and whether the import stands at the top level."""
    tree = ast.parse(path.read_text())
    inside = {
        id(node) for function in ast.walk(tree) if isinstance(function, ast.FunctionDef) for node in ast.walk(function)
    }
    guarded = {id(node) for test in ast.walk(tree) if isinstance(test, ast.If) for node in ast.walk(test)}
    found = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            if node.module == "tokenmerge":
                names = [f"tokenmerge.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found += [(name, id(node) not in inside | guarded) for name in names]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_no_import_climbs(path: Path) -> None:
    rooms = {child.stem for child in SRC.iterdir()}
    own = FLOORS.index(_room(path))
    for name, is_top in _imports(path):
        parts = name.split(".")
        if parts[0] == "tokenmerge":
            # type checkers alone are shown what is in them
            if _room(path) == "" and (name in LAZY or (name.startswith(LAZY) and not is_top)):
                continue
            room = _room_of(*parts[1:]) if len(parts) > 1 and parts[1] in rooms else ""
            assert FLOORS.index(room) <= own, f"{path.relative_to(SRC)} imports {name}, which stands above it"


@pytest.mark.parametrize("package", LAZY)
def test_a_lazy_package_imports_nothing(package: str) -> None:
    path = SRC.joinpath(*package.split(".")[1:], "__init__.py")
    assert [name for name, is_top in _imports(path) if is_top and name.startswith("tokenmerge")] == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_host_libraries_are_imported_on_first_use(path: Path) -> None:
    at_top = {name.split(".")[0] for name, is_top in _imports(path) if is_top}
    # these are themselves imported on first use
    assert not at_top & (HOSTS - {"triton"} if path.match("kernels/triton_*.py") else HOSTS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            docs = ast.get_docstring(node)
            length = (node.end_lineno or 0) - node.lineno + 1 - (len(docs.splitlines()) if docs else 0)
            assert length <= 50, f"{path.name}: {node.name} has {length} lines"


def _classes(room: str) -> dict[str, str]:
    found = {}
    for path in sorted((SRC / room).rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                found[node.name] = path.stem
    return found


def test_every_plug_in_file_is_listed() -> None:
    """Files that hold none are the machinery: `base` and what it is made of."""
    listed = {type(adapter).__name__ for adapter in adapters.ADAPTERS}
    families = {stem for name, stem in _classes("adapters").items() if name in listed}
    files = {path.stem for path in (SRC / "adapters").rglob("*.py")}
    machinery = {"__init__", "_older", "base", "by_size", "refused", "generic", "within", "interface", "options"}
    assert files - families == machinery
    names = {methods.find(name).__name__ for name in methods.list_methods()}
    files = {stem for name, stem in _classes("methods").items() if name in names}
    assert files == {path.stem for path in (SRC / "methods").glob("*.py")} - {"__init__", "base", "catalog", "learned"}
    table = [kernel for row in kernels.TABLE.values() for kernel in row]
    listed = {kernel.run.__module__.rpartition(".")[2] for kernel in table if kernel.name != "triton"}
    # these are imported by the functions in the table
    listed |= set(re.findall(r"import (triton_\w+)\n", (SRC / "kernels/__init__.py").read_text())) | {"triton_supports"}
    assert listed == {path.stem for path in (SRC / "kernels").glob("*.py")} - {"__init__"}
