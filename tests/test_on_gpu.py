"""`benchmarks/on_gpu.py`: every step in a dry run, and what is left of a run that was cut off or met faults."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import on_gpu, registry
from benchmarks.gpu import machine, right
from benchmarks.gpu.steps import Job, Record, Step

from tokenmerge import kernels
from tokenmerge.kernels import reference

Capture = pytest.CaptureFixture[str]
MACHINE = Step("environment", "machine", "bodies_on_gpu:machine", seconds=0, is_always=True)
# of the rows of each table, those that a reader must find
FIELDS = {
    "machine": {"device", "driver_version", "torch", "triton", "python", "pstate", "clocks.sm", "commit"},
    "gpu-smoke": {"check", "result"},
    "gpu-tests": {"test", "seconds", "result"},
    "gpu-correct": {"op", "result"},
    "gpu-eager": {"case", "ms", "spread %", "unmerged ms", "speed-up", "over bound", "reference over bound", "kernels"},
    "gpu-compiled": {"case", "ms", "speed-up", "over bound", "reference ms", "met", "kernels"},
    "gpu-graphs": {"case", "ms", "speed-up", "over bound", "met", "kernels"},
    "gpu-captured": {
        "case",
        "batch",
        "ms",
        "speed-up",
        "over bound",
        "eager merged ms",
        "replay error",
        "old images'",
        "result",
    },
    "gpu-ops": {"case", "kernel", "ms", "reference ms", "reference / ours", "over no bias", "met"},
    "gpu-memory": {"case", "peak MB", "unmerged peak MB", "merged / unmerged"},
    "gpu-training": {"precision", "variant", "ms", "peak MB", "loss", "steps left out", "speed-up", "result"},
    "gpu-vlm": {
        "model",
        "batch",
        "keep",
        "r",
        "tower ms",
        "prefill ms",
        "first token speed-up",
        "speed-up",
        "over bound",
    },
    "gpu-parallel": {"backend", "way", "error", "result"},
}


def _step(name: str, body: str = "good", **options: Any) -> Step:
    return Step(name, f"gpu-{name}", f"bodies_on_gpu:{body}", **{"seconds": 0, "least_share": 60.0, **options})


@pytest.fixture
def go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs steps in `tmp_path` and returns the record that is left."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))

    def run(*steps: Step, budget: float = 600, **options: Any) -> Record:
        whole = on_gpu.Run([MACHINE, *steps], tmp_path, Job(), "cuda")
        whole.go([MACHINE, *steps], budget, **options)
        return Record(tmp_path / "on_gpu.jsonl")

    return run


@pytest.mark.slow
def test_every_step_runs_dry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # what a plain image does not have
    for name in ("rich", "matplotlib", "tensorboard"):
        (tmp_path / "absent").mkdir(exist_ok=True)
        (tmp_path / "absent" / f"{name}.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "absent"))
    assert on_gpu.main(["--dry-run", "--budget", "580", "--out", str(tmp_path)]) == 0, (
        tmp_path / "on_gpu.log"
    ).read_text()
    record = Record(tmp_path / "on_gpu.jsonl")
    page = (tmp_path / "on_gpu.md").read_text()
    assert "A dry run on the CPU" in page and "not measured (budget)" not in page
    for step in on_gpu.STEPS:
        assert record.status(step.name) == "ok" and f"| {step.name} " in page
        rows = [entry["row"] for entry in record.entries if entry["step"] == step.name and "row" in entry]
        assert rows and all(row.keys() >= FIELDS[step.table] for row in rows), (step.name, rows[:1])
    for table in FIELDS.keys() - {"machine"}:
        with (tmp_path / f"{table}.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == len(record.rows(table))
        assert all(row["device"] and row["torch"] == torch.__version__ for row in rows)
        assert (tmp_path / f"{table}.md").read_text().startswith("| ")
    cases = {row["case"] for row in record.rows("gpu-ops")}
    assert cases == {case.name for case in registry.choose(group="gpu-ops")}
    # every version has a column of its own
    assert {"columns ms", "values ms"} <= record.rows("gpu-ops")[0].keys()


def test_what_a_run_had_measured_is_left_and_the_next_goes_on(go: Any, tmp_path: Path) -> None:
    steps = (_step("first"), _step("cut", "hangs", least_share=0.5), _step("large", seconds=500), _step("small"))
    record = go(*steps, budget=400)
    assert [record.status(step.name) for step in steps] == ["ok", "cut", "", "ok"]
    assert record.rows("gpu-cut") == [{"what": "before"}]  # said before it was cut off
    page = (tmp_path / "on_gpu.md").read_text()
    assert [line.split("|")[3].strip() for line in page.splitlines() if line.startswith("| large")] == [
        "not measured (budget)"
    ]
    assert "cut off after its share" in page and not (tmp_path / "gpu-large.csv").exists()
    first = record.rows("gpu-first")
    # now it fits, and what was cut off comes last
    again = go(*steps[:1], replace(steps[1], body="bodies_on_gpu:good"), *steps[2:])
    assert [again.status(step.name) for step in steps] == ["ok"] * 4
    assert again.rows("gpu-first") == first
    ended = [entry["step"] for entry in again.entries if "status" in entry]
    assert ended.index("large") < ended.index("cut")
    assert "not measured" not in (tmp_path / "on_gpu.md").read_text()
    assert go(*steps[:1], again=True).rows("gpu-first") != first


def test_a_budget_of_nothing_measures_nothing_and_names_all(go: Any, tmp_path: Path) -> None:
    record = go(_step("first", seconds=5), budget=1)
    assert record.status("first") == "" and record.status("environment") == "ok"
    assert "| first " in (tmp_path / "on_gpu.md").read_text()


@pytest.mark.parametrize(
    ("body", "error", "left"),
    [
        ("raises", "RuntimeError: CUDA error: an illegal memory access", 1),
        ("dies", "its process ended with -11: ", 0),
        ("wrong", "1 of 2 results are wrong, the first: {'what': 'second'", 2),
        ("nothing", "it measured nothing", 0),
        ("missing", "AttributeError", 0),
    ],
)
def test_a_step_that_fails_takes_no_other_with_it(
    go: Any, tmp_path: Path, capsys: Capture, body: str, error: str, left: int
) -> None:
    record = go(_step("before"), _step("bad", body), _step("after"))
    assert [record.status(name) for name in ("before", "bad", "after")] == ["ok", "failed", "ok"]
    assert error in record.ends("bad")[0]["error"] and len(record.rows("gpu-bad")) == left
    assert error in (tmp_path / "on_gpu.md").read_text()
    assert "failed after" in capsys.readouterr().err


def test_kernels_that_fail_are_followed_by_those_that_are_chosen(
    go: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(on_gpu, "find_spec", lambda name: "there")
    record = go(_step("model", "only_without_triton", is_forced=True))
    assert [(end["kernels"], end["status"]) for end in record.ends("model")] == [("triton", "failed"), ("chosen", "ok")]
    assert on_gpu.Run([MACHINE], tmp_path, Job()).finish([_step("model")]) == 1
    # wrong kernels are not timed at all
    record = go(_step("correct-merge", "wrong"), _step("other", "only_without_triton", is_forced=True))
    assert [(end["kernels"], end["status"]) for end in record.ends("other")] == [("chosen", "ok")]


def test_figures_of_two_machines_do_not_mix(go: Any, tmp_path: Path, capsys: Capture) -> None:
    go(_step("first"))
    other = replace(MACHINE, options=(("device", "another card"),))
    assert on_gpu.main(["--out", str(tmp_path)], [other, _step("first"), _step("second")]) == 2
    said = capsys.readouterr().err
    assert "another card" in said and "Give another --out" in said
    assert Record(tmp_path / "on_gpu.jsonl").status("second") == ""


def test_without_a_device_nothing_is_measured(go: Any, tmp_path: Path, capsys: Capture) -> None:
    none = replace(MACHINE, options=(("device", "none"),))
    assert on_gpu.main(["--out", str(tmp_path)], [none, _step("first")]) == 2
    assert "no device 'cuda'" in capsys.readouterr().err
    assert not (tmp_path / "gpu-first.csv").exists()


def test_a_run_that_is_told_to_end_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    code = (
        "import signal, sys; from benchmarks import on_gpu; from test_on_gpu import MACHINE, _step\n"
        "signal.signal(signal.SIGTERM, signal.default_int_handler)\n"
        f"sys.exit(on_gpu.main(['--out', {str(tmp_path)!r}], [MACHINE, _step('first'), _step('second', 'hangs')]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=on_gpu.ROOT, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "gpu-second.csv").exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.terminate()
    _, said = process.communicate()
    assert process.returncode == 130 and "the same command goes on" in said
    record = Record(tmp_path / "on_gpu.jsonl")
    assert [record.status(name) for name in ("first", "second")] == ["ok", ""]


def test_a_mistake_in_what_was_asked(tmp_path: Path, capsys: Capture) -> None:
    assert on_gpu.main(["--out", str(tmp_path), "--only", "smok"]) == 2
    assert "smoke" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        on_gpu.main(["--device", "cpu"])
    assert "--dry-run is for the CPU" in capsys.readouterr().err


def test_every_case_that_is_named_is_there() -> None:
    for step in on_gpu.STEPS:
        registry.choose(dict(step.options).get("names", ()))
    assert len({step.name for step in on_gpu.STEPS}) == len(on_gpu.STEPS)


def test_clocks_are_read_where_they_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert set(machine.power().values()) == {"not read"}
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho '{', '.join(map(str, range(len(machine.SMI))))}'\n")
    tool.chmod(0o755)
    assert list(machine.power().values()) == [str(i) for i in range(len(machine.SMI))]
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert set(machine.power().values()) == {"not read"}


@pytest.mark.parametrize("op", ["attend", "merge", "bipartite"])
def test_a_kernel_that_is_wrong_is_called_so(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = registry.OpCase("", "", op, 2, 2, 19, 8, 0 if op == "attend" else 4)
    name = {"attend": "triton_attention", "merge": "triton_merge", "bipartite": "triton_match"}[op]
    run = getattr(reference, op)
    for fault, result in ((lambda out: out, "right"), (_FAULTS[op], "WRONG")):
        monkeypatch.setattr(
            kernels, name, SimpleNamespace(**{op: lambda *a, fault=fault: fault(run(*a))}), raising=False
        )
        row = right._CORRECT[op](case, torch.float32)
        assert row["result"] == result, json.dumps(row)


def _one_partner(plan: Any) -> Any:
    keep, src, dst = plan
    dst = dst.clone()
    dst[0, 0] = keep.shape[1] - 1 if dst[0, 0] < keep.shape[1] - 1 else dst[0, 0] - 1
    return keep, src, dst


_FAULTS = {
    "attend": lambda out: torch.cat((out[:, :, :-1], out[:, :, -1:] * 1.01), dim=2),
    "merge": lambda out: (out[0] + 0.001 * out[0].detach().amax(), out[1]),
    "bipartite": _one_partner,
}
