"""Prove a change of a kernel and then time it against another commit; a red test stops it before any timing."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import registry, run
from benchmarks.worker import install

from tokenmerge.errors import TokenMergeError, unknown_name

ROOT = Path(__file__).parents[1]
# all of them, because a kernel of one operation can break the selection of another
TESTS = ("tests/conformance/test_kernels.py", "tests/kernels")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the kernel tests, then the comparison; return 1 for failing tests, 2 for a user error."""
    parser = argparse.ArgumentParser(description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--op", help="every case of this operation: bipartite, merge, attend")
    what.add_argument("--case", help="one case of the registry (run.py --list)")
    parser.add_argument("--base", default="main", metavar="REF", help="the commit to compare with (%(default)s)")
    parser.add_argument("--rounds", default="20", help="timed rounds per case (%(default)s)")
    parser.add_argument("--threads", default="2", help="threads of the CPU (%(default)s)")
    arguments = parser.parse_args(argv)
    try:
        names = [case.name for case in _cases(arguments.op, arguments.case)]
        code = _test()
    except TokenMergeError as error:
        print(f"verify: {error}", file=sys.stderr)
        return 2
    if code:
        print(
            f"verify: the tests are red (pytest returned {code}): nothing is timed. Mend them first.", file=sys.stderr
        )
        return 1
    options = ["--base", arguments.base, "--rounds", arguments.rounds, "--threads", arguments.threads]
    return run.main(["--cases", *names, *options])


def _test() -> int:
    """Run the tests on the code to be timed: this tree, newly installed, not the package in the environment."""
    tests = [str(path) for path in map(ROOT.joinpath, TESTS) if path.exists()]
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPATH": str(install(ROOT, Path(folder, "this")))}
        command = [sys.executable, "-m", "pytest", *tests]
        return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def _cases(op: str | None, case: str | None) -> list[registry.Case]:
    if case is not None:
        return registry.choose([case])
    of_ops = [entry for entry in registry.choose() if isinstance(entry, registry.OpCase)]
    if op not in (known := sorted({entry.op for entry in of_ops})):
        raise unknown_name("operation", str(op), known)
    return [entry for entry in of_ops if entry.op == op]


if __name__ == "__main__":
    sys.exit(main())
