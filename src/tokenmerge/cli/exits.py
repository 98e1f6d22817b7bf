"""The end of a command: one sentence on stderr for an error, and an exit code."""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
from collections.abc import Callable

from tokenmerge.errors import TokenMergeError

__all__ = ["ended"]


def ended(run: Callable[[], int], arguments: argparse.Namespace) -> int:
    """Run a command and return its exit code; an interruption prints `arguments.left`, if set.

    0: success. 1: a check failed. 2: a user error, or too little disk or memory. 130: interrupted. 141: the reader of
    stdout has closed the pipe.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(
                errors="backslashreplace"
            )  # file names may contain characters that the terminal cannot print
    try:
        code = run()
        sys.stdout.flush()
        return code
    except TokenMergeError as error:
        return _failed(str(error), getattr(error, "exit_code", 2))  # a training run stopped by Ctrl-C has its own code
    except KeyboardInterrupt:
        return _failed(f"interrupted, {getattr(arguments, 'left', 'nothing more was written')}.", 130)
    except BrokenPipeError:
        _close_stdout()
        return 141
    except OSError as error:  # full disk, unreadable folder
        _close_stdout()
        where = f" ({error.filename})" if error.filename else ""
        return _failed(f"{error.strerror or error}{where}.")
    except (MemoryError, RuntimeError) as error:
        # torch has an exception type for GPU memory only
        if not isinstance(error, MemoryError) and not re.search(
            "out of memory|allocate memory|(calculation|multiplication) overflow", str(error)
        ):
            raise
        return _failed(f"the memory is too small for this: {' '.join(str(error).split())[:300]}")


def _failed(text: str, code: int = 2) -> int:
    print(f"tokenmerge: {text}", file=sys.stderr)
    return code


def _close_stdout() -> None:
    """Discard the rest of the buffer: Python would try to flush it at exit and report an error."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
