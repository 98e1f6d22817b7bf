"""Everything that a GPU must show, most important first, within a budget of seconds; cut off, a rerun goes on.

    python benchmarks/on_gpu.py --budget 540

Rows are written to DIR/gpu-*.csv and .md when they are measured, and a page about the whole run to DIR/on_gpu.md. It
needs torch, timm and the tree; Triton, transformers and pytest for the steps about them. `--dry-run` runs every step at
a tiny size on the CPU.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from benchmarks.gpu.machine import power
from benchmarks.gpu.steps import ROOT, Job, Process, Record, Row, Step, run

from tokenmerge.errors import DataError, TokenMergeError, unknown_name
from tokenmerge.files import write_file
from tokenmerge.report.table import as_markdown, save_rows

RIGHT, FAST, MACHINE = "benchmarks.gpu.right", "benchmarks.gpu.fast", "benchmarks.gpu.machine"
VLM = "benchmarks.gpu.vlm"
SHAPES = ("b256-h12-n197", "b64-h16-n577", "b1-h12-n197")
MODELS = ("vit_base_patch16_224", "vit_large_patch16_384", "vit_huge_patch14_224")


def _tests(name: str, seconds: float, *paths: str) -> Step:
    # tests may change global settings
    options = (("paths", [f"tests/{path}" for path in paths]),)
    return Step(f"tests-{name}", "gpu-tests", f"{RIGHT}:tests", options, seconds, spoils=True)


def _correct(op: str, seconds: float) -> Step:
    return Step(f"correct-{op}", "gpu-correct", f"{RIGHT}:correct", (("op", op),), seconds)


def _measured(name: str, table: str, seconds: float, *cases: str, body: str = "measured") -> Step:
    return Step(name, table, f"{FAST}:{body}", (("names", cases),), seconds, is_forced=True)


def _model(group: str, model: str, seconds: float) -> Step:
    return _measured(f"{group}-{model}", f"gpu-{group}", seconds, f"gpu-{group}-{model}")


def _graphs(model: str, seconds: float) -> Step:
    cases = [f"gpu-graphs-{model}-b{batch}" for batch in (1, 8)]
    return _measured(f"captured-{model}", "gpu-captured", seconds, *cases, body="graphs")


def _training(precision: str, seconds: float) -> Step:
    options = (("precision", precision),)
    return Step(f"training-{precision}", "gpu-training", f"{FAST}:training", options, seconds, is_forced=True)


# in order of importance; the seconds are estimates, not measured
STEPS: tuple[Step, ...] = (
    Step("environment", "machine", f"{MACHINE}:environment", seconds=15, is_always=True),
    Step("smoke", "gpu-smoke", f"{RIGHT}:smoke", seconds=15),
    _tests("gpu", 40, "test_gpu.py"),
    _tests("kernels", 80, "kernels"),
    _tests("training", 50, "training"),
    _correct("bipartite", 10),
    _correct("merge", 10),
    _correct("attend", 25),
    *(_model("eager", model, seconds) for model, seconds in zip(MODELS, (12, 15, 20), strict=True)),
    _model("compiled", MODELS[0], 100),
    *(_graphs(model, seconds) for model, seconds in zip(MODELS, (8, 12, 15), strict=True)),
    _measured("attend-n197", "gpu-ops", 20, "gpu-ops-attend-b256-h12-n197"),
    _measured("attend-n577", "gpu-ops", 10, "gpu-ops-attend-b64-h16-n577"),
    _measured("attend-n1025", "gpu-ops", 10, "gpu-ops-attend-b16-h16-n1025"),
    _measured("attend-n4097", "gpu-ops", 10, "gpu-ops-attend-b2-h16-n4097"),
    *(
        _measured(
            op, "gpu-ops", 20, *(f"gpu-ops-{op}-{shape}" for shape in ("b256-h12-n197", "b64-h16-n577", "b1-h12-n197"))
        )
        for op in ("bipartite", "merge")
    ),
    _measured(
        "memory",
        "gpu-memory",
        15,
        "gpu-memory-bipartite-b2-h1-n16384",
        *(f"gpu-memory-{model}" for model in MODELS),
    ),
    *(
        Step(f"training-{kind}", "gpu-training", f"{FAST}:training", (("precision", kind),), 20)
        for kind in ("bf16", "fp16")
    ),
    Step("parallel", "gpu-parallel", f"{RIGHT}:parallel", seconds=15),
    *(
        Step(f"vlm-{name}-b{batch}", "gpu-vlm", f"{VLM}:vlm", (("name", name), ("batch", batch)), seconds)
        for name, batch, seconds in (("smolvlm", 1, 30), ("llava", 1, 30), ("llava", 8, 40))
    ),
    # compiling takes a minute or more, so these come last or in a second run
    *(_model("compiled", model, 150) for model in MODELS[1:]),
    _measured("graphs-compiled", "gpu-graphs", 120, *(f"gpu-graphs-{MODELS[0]}-b{batch}" for batch in (1, 8))),
    _model("eager", "vit_large_patch16_224", 12),
)


# rows of one table must agree in these; the other facts are noted beside the table
SAME = ("device", "torch")
FACTS = (*SAME, "driver_version", "cuda", "triton", "python", "timm", "tokenmerge")


def main(argv: Sequence[str] | None = None, steps: Sequence[Step] = STEPS) -> int:
    """Run the requested steps; return 1 if a step failed, 2 for a user error."""
    arguments = _parser().parse_args(argv)
    results = ROOT / "benchmarks" / "results"
    try:
        if arguments.dry_run:
            # a dry run has no time limits per step, since the machine may be busy; skipped tests change no settings
            steps = [replace(step, seconds=1.0, least_share=arguments.budget, spoils=False) for step in steps]
        chosen = _chosen(steps, arguments.only)
        out = arguments.out or (Path(tempfile.mkdtemp(prefix="on_gpu-")) if arguments.dry_run else results)
        out.mkdir(parents=True, exist_ok=True)
        job = Job("cpu", True, rounds=1) if arguments.dry_run else Job(rounds=arguments.rounds)
        whole = Run(steps, out, job, arguments.device)
        whole.go(chosen, arguments.budget, again=arguments.again)
    except TokenMergeError as error:
        print(f"on_gpu: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("on_gpu: cut off; the same command goes on with what is missing", file=sys.stderr)
        return 130
    return whole.finish(chosen)


class Run:
    """A run of steps, and its output files."""

    def __init__(self, steps: Sequence[Step], out: Path, job: Job, device: str = "") -> None:
        self.steps, self.out, self.job, self.device = steps, out, job, device
        self.record = Record(out / "on_gpu.jsonl")

    def go(self, chosen: Sequence[Step], budget: float, *, again: bool = False) -> None:
        """Run the missing steps; raise `DataError` without a device, or if the figures are of another device."""
        # so that every step sees only this device
        environment = {"CUDA_VISIBLE_DEVICES": self.device.partition(":")[2]} if ":" in self.device else {}
        if self.job.is_tiny:
            environment = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        run(
            chosen,
            self.record,
            budget=budget,
            attempts=self._attempts,
            start=lambda: Process(self.out / "on_gpu.log", environment),
            changed=self._changed,
            about=self._about,
            again=again,
        )

    def finish(self, chosen: Sequence[Step]) -> int:
        """Write the page a last time and print it; return the exit code."""
        page = self._write_page(power())
        print(page)
        ends = [end["status"] for step in chosen for end in self.record.ends(step.name)]
        return 1 if set(ends) - {"ok"} else 0

    def _attempts(self, step: Step) -> list[Job]:
        if not step.is_always:
            self._check_machine()
        found = {
            end["status"] for known in self.steps for end in self.record.ends(known.name) if "correct" in known.name
        }
        is_sound = find_spec("triton") is not None and found <= {"ok"}
        names = ["triton", ""] if step.is_forced and is_sound else [""]
        return [Job(self.job.device, self.job.is_tiny, self.job.rounds, name) for name in names]

    def _check_machine(self) -> None:
        about = self._about()
        if about.get("device", "none") == "none":
            raise DataError(
                f"this machine has no device {self.device!r}: nothing can be measured. --dry-run tries every step "
                "on the CPU."
            )
        for entry in self.record.entries:
            if any(entry["about"].get(name, about[name]) != about[name] for name in SAME):
                raise DataError(
                    f"{self.record.path} holds figures of {entry['about']}, and this is {about}. Give another --out, "
                    "or remove that file."
                )

    def _about(self) -> Row:
        """Return the facts needed to judge a figure, once known."""
        machine: list[Row] = self.record.rows("machine")
        if not machine:
            return {}
        facts = {name: machine[-1][name] for name in FACTS}
        return {**facts, "rounds": str(self.job.rounds), **({"dry": "run"} if self.job.is_tiny else {})}

    def _changed(self, step: Step) -> None:
        rows = self.record.rows(step.table)
        if rows and step.table != "machine":
            names = list(dict.fromkeys(name for row in rows for name in row))
            even = [{name: row.get(name) for name in names} for row in rows]
            for suffix in (".csv", ".md"):
                part = self.out / f"{step.table}.part{suffix}"
                save_rows(part, even, self._about(), ["Written by `python benchmarks/on_gpu.py`: docs/benchmarks.md."])
                part.replace(self.out / f"{step.table}{suffix}")
        ends = self.record.ends(step.name)
        if ends:
            self._write_page({})
            print(f"{_line(ends[-1])}: {step.name}", file=sys.stderr, flush=True)

    def _write_page(self, power: Row) -> str:
        machine: Row = (self.record.rows("machine") or [{}])[-1]
        lines: list[Row] = []
        errors = []
        for step in self.steps:
            ends = self.record.ends(step.name)
            for end in ends or [{"status": "not measured (budget)"}]:
                seconds, kernels = end.get("seconds"), end.get("kernels", "")
                table = "" if step.table == "machine" else f"{step.table}.md"
                lines.append(
                    {"step": step.name, "kernels": kernels, "result": end["status"], "s": seconds, "rows": table}
                )
                if end.get("error"):
                    errors.append(f"{step.name}, kernels {kernels}, {end['status']}:\n\n```\n{end['error']}\n```")
        facts: list[Row] = [{"machine": name, "as read": str(value)} for name, value in machine.items()]
        facts += [{"machine": f"{name} at the end", "as read": value} for name, value in power.items()]
        kind = "A dry run on the CPU: no figure of it means anything." if self.job.is_tiny else "Nothing was set."
        again = "A step without a result is measured by the same command again; --again measures all anew."
        parts = [
            "# What a GPU showed",
            kind,
            *([as_markdown(facts)] if facts else []),
            as_markdown(lines),
            again,
            *errors,
        ]
        page = "\n\n".join(parts) + "\n"
        write_file(self.out / "on_gpu.md", page)
        return page


def _line(end: dict[str, Any]) -> str:
    return f"{end['status']:>6} after {end['seconds']:5.1f} s, kernels {end['kernels']}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=540, help="seconds of the whole run (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="benchmarks/results; of a dry run a new folder")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="only these steps, in the usual order")
    parser.add_argument("--again", action="store_true", help="measure what is measured already anew")
    parser.add_argument("--dry-run", action="store_true", help="every step at a tiny size on the CPU")
    parser.add_argument("--device", default="cuda", type=_device, help="cuda, cuda:1 (%(default)s)")
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds (%(default)s)")
    return parser


def _device(text: str) -> str:
    kind, _, index = text.partition(":")
    if kind != "cuda" or (index and not index.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is no CUDA device: cuda, or cuda:1. --dry-run is for the CPU")
    return text


def _chosen(steps: Sequence[Step], names: Sequence[str]) -> list[Step]:
    known = [step.name for step in steps]
    for name in names:
        if name not in known:
            raise unknown_name("step", name, known)
    return [step for step in steps if not names or step.name in names or step.is_always]


if __name__ == "__main__":
    # a job scheduler's SIGTERM must also end the child processes
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
