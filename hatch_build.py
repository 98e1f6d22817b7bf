"""Build `native.cpp` with the package, where there is a C++ compiler; without one the package is pure Python.

`TOKENMERGE_NATIVE=0` leaves it out, `TOKENMERGE_NATIVE=1` makes a build that fails an error.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE = Path(__file__).parent / "src/tokenmerge/kernels/native.cpp"
# one library per set of vector instructions; cpu.py loads the one that torch would use on the machine at hand
VARIANTS = {"avx512": ["-march=x86-64-v4"], "avx2": ["-march=x86-64-v3"], "base": []}
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fno-exceptions", "-fno-rtti"]


class NativeBuild(BuildHookInterface):
    """Compiles before the files are collected, for wheels and for editable installs alike."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        wish = os.environ.get("TOKENMERGE_NATIVE", "")
        if self.target_name != "wheel" or wish == "0":
            return
        problem = compile_all()
        if problem is None:
            build_data["artifacts"].append("src/tokenmerge/kernels/native.*.so")
            build_data["pure_python"] = False
            build_data["tag"] = "py3-none-" + sysconfig.get_platform().replace("-", "_").replace(".", "_")
        elif wish == "1":
            raise RuntimeError(problem)
        else:
            self.app.display_warning(f"{problem}\nGoing on without the part in C++: merging works, a little slower.")


def compile_all() -> str | None:
    """Write the libraries beside their source; returns why that was not possible."""
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None or sys.platform == "win32":
        return "no C++ compiler (c++) was found."
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    # not linked with OpenMP: it is to be the one that torch has loaded, with its threads
    openmp, link = (["-fopenmp"], []) if sys.platform == "linux" else ([], ["-undefined", "dynamic_lookup"])
    for name, options in VARIANTS.items() if is_x86 else [("base", [])]:
        target = SOURCE.with_name(f"native.{name}.so")  # with a dot, since it is no module that Python could import
        part = target.with_suffix(".o")
        try:
            for command in (
                [compiler, *FLAGS, *options, *openmp, "-c", str(SOURCE), "-o", str(part)],
                [compiler, "-shared", *link, str(part), "-o", str(target)],
            ):
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    return f"{' '.join(command)} failed:\n{done.stderr[-2000:]}"
        finally:
            part.unlink(missing_ok=True)
    return None
