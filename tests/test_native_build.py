"""The part in C++ is optional: what a build does where it cannot be compiled."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tokenmerge.kernels import cpu

ROOT = Path(__file__).parents[1]
_INTERFACE = "hatchling.builders.hooks.plugin.interface"


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The build script; its host, which lives in build environments only, is stood in for."""
    interface = ModuleType(_INTERFACE)
    interface.BuildHookInterface = object  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, _INTERFACE, interface)
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _hook(build: Any) -> tuple[Any, list[str], dict[str, Any]]:
    hook, warnings = build.NativeBuild(), []
    hook.target_name, hook.app = "wheel", SimpleNamespace(display_warning=warnings.append)
    return hook, warnings, {"artifacts": []}


def test_without_a_compiler_the_package_is_pure(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("TOKENMERGE_NATIVE", raising=False)
    monkeypatch.setenv("PATH", "")
    hook, warnings, data = _hook(build)
    hook.initialize("standard", data)
    assert data == {"artifacts": []} and "no C++ compiler (c++) was found" in warnings[0]
    monkeypatch.setenv("TOKENMERGE_NATIVE", "1")
    with pytest.raises(RuntimeError, match=r"no C\+\+ compiler"):
        hook.initialize("standard", data)


def test_a_build_that_fails_says_why(build: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = tmp_path / "native.cpp"
    source.write_text("this is no C++\n")
    monkeypatch.setattr(build, "SOURCE", source)
    assert "native.cpp" in str(build.compile_all())
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.skipif(cpu._LIBRARY is None, reason="the part in C++ was not built: no compiler")
def test_what_is_built_loads(build: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = tmp_path / "native.cpp"
    source.write_bytes(build.SOURCE.read_bytes())
    monkeypatch.setattr(build, "SOURCE", source)
    monkeypatch.setattr(cpu, "__file__", str(tmp_path / "cpu.py"))
    assert cpu._load() is None
    hook, _, data = _hook(build)
    hook.initialize("standard", data)
    assert data["pure_python"] is False and data["tag"].startswith("py3-none-")
    assert cpu._load() is not None
    monkeypatch.setattr(cpu, "_INTERFACE", cpu._INTERFACE + 1)
    assert cpu._load() is None, "a library of another version"
