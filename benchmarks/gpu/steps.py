"""Steps under a time budget: each runs in a process that may die, and what it measures is written at once.

Run as a module this file is that process. It imports no torch by itself: a step's body does.
"""

from __future__ import annotations

import json
import os
import pkgutil
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
Row = dict[str, Any]
Say = Callable[[Row], None]  # how a body hands on a row, when it is measured
WRONG = "WRONG"  # in a row's column `result`: what was measured is not what must be


@dataclass(frozen=True)
class Job:
    """What a body is told."""

    device: str = "cuda"
    is_tiny: bool = False  # a dry run: the smallest sizes that pass through the same code
    rounds: int = 20
    kernels: str = ""  # the version of the kernels to force; none: those that tokenmerge chooses


@dataclass(frozen=True)
class Step:
    """One part of the work; `body` is `module:function`, given the job and how to say a row; it raises to give up."""

    name: str
    table: str  # the file its rows go to
    body: str
    options: tuple[tuple[str, Any], ...] = ()  # of the body, besides the job
    seconds: float = 15.0  # about how long it takes; it starts only while that is left
    spoils: bool = False  # its process is good for nothing else afterwards
    is_always: bool = False  # measured in every run
    is_forced: bool = False  # tries the forced kernels first, and where that fails the chosen ones

    least_share: float = 30.0

    @property
    def share(self) -> float:
        """Seconds after which it is cut off."""
        return max(self.least_share, 2.5 * self.seconds)


class Record:
    """What was measured so far, one line of JSON each, in a file that is whole at every moment."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.entries: list[Row] = [json.loads(line) for line in lines]

    def add(self, **entry: Any) -> None:
        self.entries.append(entry)
        self._write()

    def forget(self, step: str) -> None:
        self.entries = [entry for entry in self.entries if entry["step"] != step]
        self._write()

    def rows(self, table: str) -> list[Row]:
        return [entry["row"] for entry in self.entries if entry.get("table") == table and "row" in entry]

    def ends(self, step: str) -> list[Row]:
        """Return how each attempt at a step ended."""
        return [entry for entry in self.entries if entry["step"] == step and "status" in entry]

    def status(self, step: str) -> str:
        """Return how the last attempt ended: ok, failed, cut, or nothing."""
        ends = self.ends(step)
        return str(ends[-1]["status"]) if ends else ""

    def _write(self) -> None:
        part = self.path.with_name(self.path.name + ".part")
        part.write_text("".join(json.dumps(entry) + "\n" for entry in self.entries), encoding="utf-8")
        part.replace(self.path)


class Process:
    """A process that runs bodies one after the other; `log` gets all that it prints."""

    def __init__(self, log: Path, environment: dict[str, str] | None = None) -> None:
        self.log = log
        # what a step needs of the tree comes first, whatever is installed
        paths = [str(ROOT / "src"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        given = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", **(environment or {})}
        with log.open("a") as file:
            self.start = file.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.gpu.steps"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env=given,
                cwd=ROOT,
                start_new_session=True,  # so that what it starts ends with it
            )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def run(self, step: Step, job: Job, limit: float, on_row: Callable[[Row], None]) -> tuple[str, str]:
        """Run a step's body and hand on each row when it comes; returns the status and the error's last lines."""
        assert self._process.stdin is not None
        end = time.monotonic() + limit
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"body": step.body, "options": step.options, "job": asdict(job)}))
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                self.close()
                return "cut", f"cut off after its share of {limit:.0f} s"
            if line is None:
                self.close()
                return "failed", f"its process ended with {self._process.returncode}: {self._last_lines()}"
            answer: Row = json.loads(line)
            if "row" in answer:
                on_row(answer["row"])
            else:
                return answer["status"], answer["error"]

    def close(self) -> None:
        """End the process and all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def _last_lines(self) -> str:
        with self.log.open(encoding="utf-8", errors="replace") as file:
            file.seek(self.start)
            return file.read()[-600:].strip()


def run(
    steps: Sequence[Step],
    record: Record,
    *,
    budget: float,
    attempts: Callable[[Step], Sequence[Job]],
    start: Callable[[], Process],
    changed: Callable[[Step], None] = lambda step: None,
    about: Callable[[], Row] = dict,
    again: bool = False,
) -> None:
    """Run what the record lacks, in order, while the budget of seconds lasts.

    What failed or was cut off before comes after what was never tried. A step that would not fit is passed over, for
    a later one that does. `attempts` gives the jobs of a step, tried until one works. `changed` is told of every row
    and end, and `about` is what each is written with.
    """
    end = time.monotonic() + budget
    process: Process | None = None
    is_spoilt = False
    try:
        for step in _order(steps, record, again):
            if end - time.monotonic() < step.seconds:
                continue
            record.forget(step.name)
            for job in attempts(step):
                if process is not None and is_spoilt and not step.spoils:
                    process.close()
                    process = None
                limit = min(step.share, end - time.monotonic())
                if limit <= 0:
                    break
                process, is_spoilt = process or start(), step.spoils
                if not _attempt(process, step, job, limit, record, changed, about):
                    process.close()
                    process = None
                    continue
                break
    finally:
        if process is not None:
            process.close()


def _order(steps: Sequence[Step], record: Record, again: bool) -> list[Step]:
    missing = [step for step in steps if again or step.is_always or not record.status(step.name)]
    return missing + [step for step in steps if step not in missing and record.status(step.name) != "ok"]


def _attempt(
    process: Process,
    step: Step,
    job: Job,
    limit: float,
    record: Record,
    changed: Callable[[Step], None],
    about: Callable[[], Row],
) -> bool:
    names = {"step": step.name, "kernels": job.kernels or "chosen"}

    def write(row: Row) -> None:
        record.add(**names, about=about(), table=step.table, row=row)
        changed(step)

    began = time.monotonic()
    status, error = process.run(step, job, limit, write)
    record.add(**names, about=about(), status=status, seconds=round(time.monotonic() - began, 1), error=error)
    changed(step)
    return status == "ok"


def serve() -> None:
    """Answer requests, one line of JSON each, until there are no more."""
    # what a library prints must not come between the answers
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(**answer: Any) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    for line in sys.stdin:
        request = json.loads(line)
        print(f"--- {request}", file=sys.stderr, flush=True)
        try:
            error = _work(request, say)
        except Exception as raised:
            traceback.print_exc()
            error = f"{type(raised).__name__}: {str(raised).strip()[-600:]}"
        say(status="failed" if error else "ok", error=error)


def _work(request: Row, say: Callable[..., None]) -> str:
    """Run a body; returns what is wrong with its rows, if anything is."""
    rows: list[Row] = []

    def tell(row: Row) -> None:
        say(row=row)
        rows.append(row)

    pkgutil.resolve_name(request["body"])(Job(**request["job"]), tell, **dict(request["options"]))
    wrong = [row for row in rows if row.get("result") == WRONG]
    if wrong:
        return f"{len(wrong)} of {len(rows)} results are wrong, the first: {wrong[0]}"
    return "" if rows else "it measured nothing"


if __name__ == "__main__":
    serve()
