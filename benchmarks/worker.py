"""Time cases with two commits in turn: one long-lived process each, which answers requests over pipes.

Run as a script, this file is such a process; PYTHONPATH selects the tokenmerge it imports.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.registry import Case, merged_call, pack, unpack

from tokenmerge.errors import DataError, UnsupportedError

if TYPE_CHECKING:
    from tokenmerge.measure.timing import Timing

# shortest duration of a round: short operations are called many times in a row
ROUND_SECONDS = 0.05
# the threads of the other process still spin for a moment after its turn
PAUSE_SECONDS = 0.02


@contextmanager
def checked_out(root: Path, ref: str) -> Iterator[Path]:
    """Check out a commit of the repository at `root` into a temporary folder, which is removed afterwards.

    Raises `DataError` for a name that is not a commit.
    """
    found = _git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{ref}^{{commit}}")
    if found.returncode:
        why = found.stderr.strip() or "git knows none of that name"
        raise DataError(f"there is no commit {ref!r} in {root}: {why}. Name a commit, a branch or a tag.")
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "base"
        added = _git(root, "worktree", "add", "--detach", str(tree), found.stdout.strip())
        if added.returncode:
            raise DataError(f"git could not check {ref!r} out: {added.stderr.strip()}. See `git worktree list`.")
        try:
            yield tree
        finally:
            _git(root, "worktree", "remove", "--force", str(tree))


def install(tree: Path, folder: Path) -> Path:
    """Install the package of a tree into its own folder, as a user would, and return the folder.

    Raises `DataError` if that fails, also if a compiler is present and the C++ part is not built, since it would be
    timed without.
    """
    environment = {**os.environ, "TOKENMERGE_NATIVE": "1" if shutil.which("c++") else "0"}
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    if importlib.util.find_spec("hatchling"):
        command.append("--no-build-isolation")  # needs no download
    done = subprocess.run(
        [*command, "--target", str(folder), str(tree)], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise DataError(f"the package of {tree} could not be installed for timing: {done.stderr.strip()[-1000:]}")
    return folder


def describe(root: Path) -> str:
    """Return the commit of a working tree, `-dirty` where tracked files differ from it."""
    if shutil.which("git") is None:
        return "unknown"
    found = _git(root, "describe", "--always", "--dirty", "--abbrev=12", "--exclude", "*")
    return found.stdout.strip() or "unknown"


def alternate(base: Worker, this: Worker, case: Case, *, rounds: int) -> tuple[Timing, Timing]:
    """Time a case in both processes, in turn; they alternate in starting a round.

    Raises `UnsupportedError` if one of them cannot run the case.
    """
    from tokenmerge.measure.timing import Timing  # not in the processes: an older commit has it elsewhere

    for worker in (base, this):
        worker.load(case)
    number = repeats(this.seconds(1))
    pairs = []
    for turn in range(rounds):
        order = (base, this) if turn % 2 else (this, base)
        seconds = {worker: worker.seconds(number) for worker in order}
        pairs.append((seconds[base], seconds[this]))
    of_base, of_this = zip(*pairs, strict=True)
    return Timing(of_base), Timing(of_this)


def repeats(seconds: float) -> int:
    """Return the number of calls per round if one call takes `seconds`."""
    return max(1, round(ROUND_SECONDS / seconds))


class Worker:
    """A process that imports tokenmerge from `folder` and times cases; a context manager that ends it."""

    def __init__(self, folder: Path, *, threads: int) -> None:
        self.folder = folder.resolve()
        environment = {**os.environ, "PYTHONPATH": str(self.folder)}
        command = [sys.executable, str(Path(__file__).resolve())]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        package = Path(self._ask(do="start", threads=threads)["package"]).resolve()
        if not package.is_relative_to(self.folder):
            self.close()
            raise DataError(f"{self.folder} holds no tokenmerge: its process imported {package}. Give another folder.")

    def load(self, case: Case) -> None:
        """Set up a case and run it a few times; raise `UnsupportedError` if this commit cannot run it."""
        answer = self._ask(do="load", case=pack(case))
        if "missing" in answer:
            raise UnsupportedError(answer["missing"])

    def seconds(self, number: int) -> float:
        """Return the seconds per call over `number` calls in a row."""
        time.sleep(PAUSE_SECONDS)
        return float(self._ask(do="time", number=number)["seconds"])

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._process.kill()
            self.close()
            raise DataError(f"the process that times {self.folder} ended on {request['do']!r}; its message is above.")
        answer: dict[str, Any] = json.loads(line)
        return answer


class _Server:
    """The server side: one method per request."""

    def __init__(self) -> None:
        self.call: Callable[[], Any] = lambda: None
        self.is_cuda = False

    def start(self, threads: int) -> dict[str, Any]:
        import tokenmerge

        torch.set_num_threads(threads)
        return {"package": tokenmerge.__file__}

    def load(self, case: dict[str, Any]) -> dict[str, Any]:
        self.call = lambda: None  # frees the last model before the next is built
        torch._dynamo.reset()
        self.is_cuda = case["device"] != "cpu"
        try:
            self.call = merged_call(unpack(case))
        except UnsupportedError as error:
            return {"missing": str(error)}
        self.time(3)
        return {}

    def time(self, number: int) -> dict[str, Any]:
        with torch.inference_mode():
            self._wait()
            start = time.perf_counter()
            for _ in range(number):
                self.call()
            self._wait()
            return {"seconds": (time.perf_counter() - start) / number}

    def _wait(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()


def serve() -> None:
    """Answer requests, one line of JSON each, until stdin ends."""
    # output of libraries must not mix with the answers
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    server = _Server()
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(getattr(server, request.pop("do"))(**request)), file=answers, flush=True)


def _git(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)


if __name__ == "__main__":
    serve()
