"""What a user's type checker and editor see of the installed package: right calls pass, each wrong one is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

import tokenmerge

HERE = Path(__file__).parent
RIGHT, WRONG = HERE / "right.py", HERE / "wrong.py"
Errors = dict[tuple[str, int], str]  # all that is said of a line, by file and number

# hosts and most of torch are in nobody's way here, and take a minute to read
SKIPPED = [
    "timm",
    "transformers",
    "peft",
    "accelerate",
    "open_clip",
    "torchvision",
    "pandas",
    "numpy",
    "PIL",
    "matplotlib",
]
SKIPPED += [
    f"torch.{name}" for name in ("distributed", "onnx", "fx", "export", "ao", "profiler", "jit", "cuda", "optim")
]
SKIPPED += [f"torch.{name}" for name in ("testing", "utils", "sparse", "backends", "package", "distributions")]
SKIPPED += [f"torch._{name}" for name in ("dynamo", "inductor", "functorch", "export", "refs", "prims", "subclasses")]
SKIPPED += ["torch._higher_order_ops"]
MYPY = "[mypy]\nstrict = true\n" + "".join(f"[mypy-{name}.*]\nfollow_imports = skip\n" for name in SKIPPED)


def _run(*command: str | Path) -> str:
    # whoever installed the package has it among the paths of the interpreter
    paths = [str(Path(tokenmerge.__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True, timeout=500).stdout


def _mypy(folder: Path) -> Errors:
    if find_spec("mypy") is None:
        pytest.skip("mypy is not installed")
    (folder / "mypy.ini").write_text(MYPY)
    cache = HERE.parents[1] / ".mypy_cache" / "typing"
    options = ["--config-file", folder / "mypy.ini", "--cache-dir", cache, "--no-error-summary", "--hide-error-context"]
    out = _run(sys.executable, "-m", "mypy", *options, RIGHT.name, WRONG.name)
    found: Errors = {}
    for line in out.splitlines():
        said = re.fullmatch(r"(.+?):(\d+): (error|note): (.*)", line)
        assert said is not None, out
        if said[3] == "error":
            found[said[1], int(said[2])] = found.get((said[1], int(said[2])), "") + said[4]
    return found


def _pyright(folder: Path) -> Errors:
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    program = next(filter(None, (shutil.which(name, path=beside) for name in ("basedpyright", "pyright"))), None)
    if program is None:
        pytest.skip("neither basedpyright nor pyright is installed")
    settings = {"include": [str(HERE)], "ignore": [str(Path(__file__))], "typeCheckingMode": "strict"}
    (folder / "pyrightconfig.json").write_text(json.dumps({**settings, "reportMissingTypeStubs": False}))
    out = _run(program, "-p", folder / "pyrightconfig.json", "--pythonpath", sys.executable, "--outputjson")
    found: Errors = {}
    for said in json.loads(out)["generalDiagnostics"]:
        if said["severity"] == "error":
            place = (Path(said["file"]).name, said["range"]["start"]["line"] + 1)
            found[place] = found.get(place, "") + said["message"]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("check", [_mypy, _pyright], ids=["mypy", "pyright"])
def test_right_calls_pass_and_wrong_ones_are_refused(check: Callable[[Path], Errors], tmp_path: Path) -> None:
    found = check(tmp_path)
    assert {place: said for place, said in found.items() if place[0] == RIGHT.name} == {}
    marks = {
        (WRONG.name, number): mark[1]
        for number, line in enumerate(WRONG.read_text().splitlines(), 1)
        if (mark := re.search(r"  # wrong (\S+?):?(?: |$)", line))
    }
    assert len(marks) > 40
    assert found.keys() - marks.keys() == set(), "an error at a line that is right"
    missed = {place[1]: word for place, word in marks.items() if word not in found.get(place, "")}
    assert missed == {}, f"not refused, or in other words: {found}"
