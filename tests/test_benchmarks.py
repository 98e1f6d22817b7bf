"""The benchmarks: their rows, what is written, two commits in turn, and that red tests stop a timing."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import registry, run, verify, worker
from benchmarks.registry import CASES, Bar, ModelCase, OpCase

import tokenmerge
from tokenmerge import kernels
from tokenmerge.errors import DataError, UnknownNameError, UnsupportedError

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
Capture = pytest.CaptureFixture[str]
SLOWER = Bar("over bound", "<=", 1000.0)
MODEL = ModelCase("tiny-model", "tiny", "test_vit", 160, 2, 8, bars=(SLOWER,))
OPS = [OpCase(f"tiny-{op}", "tiny-ops", op, 2, 2, 17, 8, 4) for op in ("bipartite", "merge", "attend")]
MEMORY = [
    OpCase("tiny-matching", "tiny-memory", "bipartite", 1, 1, 65, 8, 16, bars=(Bar("peak MB", "<=", 1.0),)),
    replace(MODEL, group="tiny-memory", bars=()),
]
ON_GPU = replace(MODEL, name="tiny-gpu", group="tiny-gpu", device="cuda")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    yield
    torch.set_num_threads(1)  # run.main sets it


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_every_script_finds_what_it_imports() -> None:
    names = sorted(path.stem for path in BENCHMARKS.glob("*.py"))
    assert {"embed", "real", "tune"} <= {*names}
    code = f"import sys; sys.argv = ['x']; import {', '.join(names)}"
    done = subprocess.run([sys.executable, "-c", code], cwd=BENCHMARKS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_groups_and_their_bars() -> None:
    bars = {
        group: {str(bar) for case in registry.choose(group=group) for bar in case.bars} for group in registry.GROUPS
    }
    compiled = {"over bound <= 1.03", "reference / merged >= 1"}
    eager = {"over bound <= 1.02", "over bound <= 1.04", "over bound <= 1.06", "reference / merged >= 1"}
    assert bars == {
        "cpu-eager": eager,
        "cpu-compiled": compiled,
        "cpu-bf16": {"reference / merged >= 1"},
        "memory": {"peak MB <= 64", "merged / unmerged <= 1"},
        "gpu-eager": {"over bound <= 1.12", "reference / merged >= 1"},
        "gpu-compiled": {"over bound <= 1.05", "reference / merged >= 1"},
        "gpu-graphs": {"speed-up >= 1"},
        "ops": {"reference / ours >= 1"},
        "gpu-ops": {"reference / ours >= 1", "over no bias <= 1.05"},
        "gpu-memory": {"peak MB <= 64", "merged / unmerged <= 1"},
    }
    assert (
        len(CASES)
        == len({case.name for case in CASES.values()})
        == sum(len(registry.choose(group=group)) for group in registry.GROUPS)
    )


def test_every_model_of_a_case_is_known_to_timm_and_takes_its_input() -> None:
    from timm.models import get_pretrained_cfg

    models = {(case.model, case.side) for case in CASES.values() if isinstance(case, ModelCase)}
    assert len(models) == 6
    assert all(get_pretrained_cfg(name).input_size == (3, side, side) for name, side in models)


@pytest.mark.parametrize("case", [*CASES.values(), MODEL, *OPS], ids=lambda case: case.name)
def test_a_case_travels_as_json(case: registry.Case) -> None:
    assert registry.unpack(json.loads(json.dumps(registry.pack(case)))) == case


@pytest.mark.parametrize(
    ("names", "group", "text"),
    [
        (["cpu-eager-vit_base_patch16"], None, "no benchmark case .*Did you mean 'cpu-eager-vit_base_patch16_224'"),
        ([], "cpu-eagre", "no group of benchmark cases 'cpu-eagre'. Did you mean 'cpu-eager'"),
    ],
    ids=["case", "group"],
)
def test_unknown_names(names: list[str], group: str | None, text: str, capsys: Capture) -> None:
    with pytest.raises(UnknownNameError, match=text):
        registry.choose(names, group)
    assert run.main(["--cases", *names] if names else ["--group", str(group)]) == 2
    assert "Did you mean" in capsys.readouterr().err


@pytest.mark.parametrize("case", OPS, ids=lambda case: case.op)
def test_an_operation_gets_what_it_takes(case: OpCase) -> None:
    mine, again = registry.arguments(case), registry.arguments(case)
    assert all(torch.equal(a, b) for a, b in zip(mine, again, strict=True) if isinstance(a, torch.Tensor))
    out = registry.operation(case)(*mine)
    with kernels.force("reference"):
        expected = registry.operation(case)(*mine)
    assert (out if case.op == "attend" else out[0]).shape == (expected if case.op == "attend" else expected[0]).shape


def test_an_operation_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedError, match=r"tiny-merge needs kernels.nothing; tokenmerge .* has none"):
        registry.merged_call(replace(OPS[1], op="nothing"))
    monkeypatch.setattr(kernels, "merge", lambda x, size: x)
    with pytest.raises(UnsupportedError, match=r"tiny-merge calls kernels.merge with 6 arguments; .* does not take"):
        registry.merged_call(OPS[1])


def test_a_model_is_measured_and_written(tmp_path: Path) -> None:
    run.measure([MODEL], rounds=1, out=tmp_path, about={"kernels": "chosen"})
    (row,) = _rows(tmp_path / "tiny.csv")
    assert (row["case"], row["model"], row["r"], row["batch"]) == ("tiny-model", "test_vit", "8", "2")
    assert all(float(row[name]) > 0 for name in ("ms", "unmerged ms", "bound ms", "reference ms", "over bound"))
    assert (row["bars"], row["met"], row["kernels"]) == ("over bound <= 1000", "yes", "chosen")
    assert row["device"] and row["torch"] == torch.__version__ and row["commit"]
    text = (tmp_path / "tiny.md").read_text()
    assert "| tiny-model |" in text and f"commit {row['commit']}" in text


def test_operations_are_measured_against_the_reference_and_its_compiled_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda call: compiled.append(call) or call)
    run.measure(OPS, rounds=1, out=tmp_path)
    assert compiled == [getattr(kernels.reference, case.op) for case in OPS]
    rows = _rows(tmp_path / "tiny-ops.csv")
    assert [(row["op"], row["shape"]) for row in rows] == [(case.op, "B2 H2 N17 D8 r4") for case in OPS]
    for row in rows:
        assert float(row["reference / ours"]) > 0 and float(row["compiled / ours"]) > 0
        assert bool(row["over no bias"]) == (row["op"] == "attend") == bool(row["no bias ms"])
    assert {row["kernel"] for row in rows} <= set(kernels.NAMES)


def test_memory_of_matching_and_of_training(tmp_path: Path) -> None:
    run.measure(MEMORY, rounds=1, out=tmp_path)
    matching, training = _rows(tmp_path / "tiny-memory.csv")
    assert (matching["what"], matching["met"], matching["merged / unmerged"]) == ("bipartite", "yes", "")
    assert (training["what"], training["met"]) == ("training step", "no bar")
    assert 0 < float(training["peak MB"]) < float(training["unmerged peak MB"])
    assert float(training["merged / unmerged"]) < 1


@no_gpu
def test_gpu_cases_are_written_as_not_measured_and_replace_no_figures(tmp_path: Path) -> None:
    run.measure([ON_GPU], rounds=1, out=tmp_path)
    (row,) = _rows(tmp_path / "tiny-gpu.csv")
    assert row["met"] == "not measured" and row["bars"] == "over bound <= 1000"
    assert row["to measure it"] == "python benchmarks/run.py --cases tiny-gpu"
    assert "this machine has no CUDA device" in (tmp_path / "tiny-gpu.md").read_text()
    run.measure([ON_GPU], rounds=1, out=tmp_path)
    assert len(_rows(tmp_path / "tiny-gpu.csv")) == 1
    (tmp_path / "tiny-gpu.csv").write_text("figures")
    run.measure([ON_GPU], rounds=1, out=tmp_path)
    assert (tmp_path / "tiny-gpu.csv").read_text() == "figures"


@pytest.mark.parametrize(
    ("bar", "figure", "spread", "met"),
    [
        (Bar("x", "<=", 1.02), 1.02, 0.0, "yes"),
        (Bar("x", "<=", 1.02), 1.03, 2.0, "within spread"),
        (Bar("x", "<=", 1.02), 1.05, 2.0, "NO"),
        (Bar("x", "<=", 64.0), 65.0, None, "NO"),
        (Bar("x", ">=", 1.0), 1.0, 0.0, "yes"),
        (Bar("x", ">=", 1.0), 0.99, 2.0, "within spread"),
        (Bar("x", ">=", 1.0), 0.97, 2.0, "NO"),
    ],
    ids=["at-most", "at-most-near", "at-most-missed", "no-spread", "at-least", "at-least-near", "at-least-missed"],
)
def test_a_bar_is_met_or_missed(bar: Bar, figure: float, spread: float | None, met: str) -> None:
    assert run.judge(replace(MODEL, bars=(bar,)), {"x": figure, "spread %": spread})["met"] == met


def test_the_worst_of_several_bars_is_told() -> None:
    bars = (Bar("x", "<=", 2.0), Bar("x", ">=", 1.5))
    told = run.judge(replace(MODEL, bars=bars), {"x": 1.0})
    assert told == {"bars": "x <= 2, x >= 1.5", "met": "NO"}
    assert run.judge(replace(MODEL, bars=()), {}) == {"bars": "none", "met": "no bar"}


def test_arguments_reach_the_measurement(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.delenv("TOKENMERGE_KERNELS", raising=False)
    seen: list[Any] = []
    monkeypatch.setattr(run, "measure", lambda cases, **options: seen.append((kernels._forced, cases, options)))
    assert run.main(["--group", "cpu-bf16", "--rounds", "3", "--threads", "1", "--kernels", "reference"]) == 0
    assert run.main(["--cases", "ops-merge-b8-h12-n197"]) == 0
    assert run.main(["--group", "gpu-memory"]) == 0
    (forced, group, options), (_, single, unwritten), (_, _, written) = seen
    assert (forced, len(group), {case.group for case in group}) == ("reference", 4, {"cpu-bf16"})
    assert options == {"rounds": 3, "out": None, "about": {"kernels": "reference"}}
    assert [case.name for case in single] == ["ops-merge-b8-h12-n197"]
    assert unwritten["out"] is None, "a selection must not replace the rows of its group"
    assert written == {"rounds": 20, "out": run.RESULTS, "about": {"kernels": "chosen"}}
    assert run.main(["--list", "--cases", "gpu-memory-bipartite-b2-h1-n16384"]) == 0
    assert capsys.readouterr().out == "gpu-memory-bipartite-b2-h1-n16384  peak MB <= 64\n"
    assert run.main(["--kernels", "refrence"]) == 2
    assert "Did you mean 'reference'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--kernels", "reference", "--base", "HEAD"], "--kernels is for one tree"),
        (["--rounds", "0"], "--rounds and --threads must be at least 1"),
        (["--cases", "a", "--group", "ops"], "not allowed with argument --cases"),
    ],
    ids=["kernels-and-base", "no-rounds", "cases-and-group"],
)
def test_options_that_make_no_sense(options: list[str], text: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        run.main(options)
    assert text in capsys.readouterr().err


def test_rounds_alternate_and_pair() -> None:
    calls: list[str] = []

    class Fake:
        def __init__(self, name: str, seconds: float) -> None:
            self.name, self.time = name, seconds

        def load(self, case: registry.Case) -> None:
            calls.append(f"load {self.name}")

        def seconds(self, number: int) -> float:
            calls.append(f"{self.name}{number}")
            return self.time

    base, this = worker.alternate(Fake("base", 0.02), Fake("this", 0.01), MODEL, rounds=3)  # type: ignore[arg-type]
    assert calls == ["load base", "load this", "this1", "this5", "base5", "base5", "this5", "this5", "base5"]
    assert (base.seconds, this.seconds) == ((0.02,) * 3, (0.01,) * 3)


BACKEND = """
import zipfile, pathlib
def build_wheel(folder, *_):
    name = "tokenmerge-0-py3-none-any.whl"
    with zipfile.ZipFile(pathlib.Path(folder, name), "w") as wheel:
        for path in pathlib.Path("src").rglob("*.py"):
            wheel.write(path, path.relative_to("src"))
        about = {
            "METADATA": "Metadata-Version: 2.1\\nName: tokenmerge\\nVersion: 0\\n",
            "WHEEL": "Wheel-Version: 1.0\\nGenerator: test\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
            "RECORD": "",
        }
        for file, text in about.items():
            wheel.writestr(f"tokenmerge-0.dist-info/{file}", text)
    return name
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with the package of this tree, whose build needs nothing but Python; its tree waits in `merge`."""
    root = tmp_path / "repository"
    package = Path(tokenmerge.__file__).parent
    shutil.copytree(package, root / "src" / "tokenmerge", ignore=shutil.ignore_patterns("assets", "__pycache__"))
    (root / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    )
    (root / "backend.py").write_text(BACKEND)
    who = ["-c", "user.name=test", "-c", "user.email=test"]
    for command in (["init", "--quiet"], ["add", "--all"], [*who, "commit", "--quiet", "--message", "base"]):
        subprocess.run(["git", "-C", str(root), *command], check=True)
    front = root / "src" / "tokenmerge" / "kernels" / "__init__.py"
    front.write_text(front.read_text() + "\n\n_merge = merge\n\n\ndef merge(*a):\n    import time\n\n")
    with front.open("a") as file:
        file.write("    time.sleep(0.02)\n    return _merge(*a)\n\n\ndel attend\n")
    return root


@pytest.mark.slow
def test_two_commits_in_turn(repository: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    cases = [MODEL, *OPS[1:], ON_GPU]
    run.compare(cases, "HEAD", rounds=4, threads=1, out=out, root=repository)
    rows = {row["case"]: row for row in _rows(out / "against-base.csv")}
    assert list(rows) == [case.name for case in cases]
    # every call is 20 ms slower in the tree than in the commit
    assert float(rows["tiny-merge"]["base / this"]) < 0.5
    assert 0 < float(rows["tiny-model"]["base / this"]) < 1
    assert rows["tiny-attend"]["base / this"] == ""
    assert "tiny-attend needs kernels.attend" in rows["tiny-attend"]["not measured"]
    if not torch.cuda.is_available():
        assert rows["tiny-gpu"]["not measured"] == "this machine has no CUDA device"
    about = rows["tiny-model"]
    assert about["this"] == f"{about['base']}-dirty" and about["torch"] == torch.__version__
    listed = subprocess.run(["git", "-C", str(repository), "worktree", "list"], capture_output=True, text=True)
    assert len(listed.stdout.splitlines()) == 1, "the worktree must be gone"


def test_a_base_that_is_no_commit(repository: Path) -> None:
    with (
        pytest.raises(DataError, match=r"no commit 'nowhere' in .*repository: .*Name a commit, a branch or a tag"),
        worker.checked_out(repository, "nowhere"),
    ):
        pytest.fail("nothing was checked out")


def test_a_package_that_cannot_be_installed(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "none"\nbackend-path = ["."]\n'
    )
    with pytest.raises(DataError, match=r"the package of .* could not be installed for timing: "):
        worker.install(tmp_path, tmp_path / "installed")


def test_a_process_without_the_package_or_that_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"holds no tokenmerge: its process imported .*Give another folder"):
        worker.Worker(tmp_path, threads=1)
    monkeypatch.setattr(worker.sys, "executable", shutil.which("false"))
    with pytest.raises(DataError, match=r"the process that times .* ended on 'start'; its message is above"):
        worker.Worker(tmp_path, threads=1)


GREEN = "import os\ndef test_merge(): assert os.environ['PYTHONPATH'].endswith('this')\n"
RED = "def test_merge(): assert False\n"


@pytest.mark.parametrize(("tests", "code"), [(GREEN, 0), (RED, 1), ("", 1)], ids=["green", "red", "no-tests"])
def test_verify_times_only_behind_green_tests(
    tests: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    (tmp_path / "test_merge.py").write_text(tests)
    timed: list[list[str]] = []
    monkeypatch.setattr(verify, "ROOT", tmp_path)
    monkeypatch.setattr(verify, "TESTS", ("test_merge.py", "not_there"))
    monkeypatch.setattr(verify, "install", lambda tree, folder: folder)
    monkeypatch.setattr(run, "main", lambda arguments: timed.append(arguments) or 0)
    assert verify.main(["--op", "merge", "--base", "HEAD", "--rounds", "5"]) == code
    if code:
        assert timed == []
        assert "the tests are red" in (said := capsys.readouterr().err) and "nothing is timed" in said
        return
    names = [case.name for case in CASES.values() if isinstance(case, OpCase) and case.op == "merge"]
    assert timed == [["--cases", *names, "--base", "HEAD", "--rounds", "5", "--threads", "2"]]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--op", "merg"], "no operation 'merg'. Did you mean 'merge'"),
        (["--case", "ops-merge"], "no benchmark case 'ops-merge'"),
    ],
    ids=["op", "case"],
)
def test_verify_knows_its_names(arguments: list[str], text: str, capsys: Capture) -> None:
    assert verify.main(arguments) == 2
    assert text in capsys.readouterr().err
