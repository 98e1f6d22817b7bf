"""How a command ends: one sentence on stderr and an exit code, whatever went wrong."""

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
    """Run a command and return its exit code; an interruption says what `arguments.left` says, if there is one.

    0: all is well; 1: a check failed; 2: a mistake in what was asked, or a disk or a memory too small for it; 130: it
    was interrupted; 141: nobody reads what it prints.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files may be of letters the terminal does not have
    try:
        code = run()
        sys.stdout.flush()
        return code
    except TokenMergeError as error:
        return _failed(str(error), getattr(error, "exit_code", 2))  # a training run that Ctrl-C stopped has its own
    except KeyboardInterrupt:
        return _failed(f"interrupted, {getattr(arguments, 'left', 'nothing more was written')}.", 130)
    except BrokenPipeError:
        _close_stdout()
        return 141
    except OSError as error:  # a disk that is full, a folder that may not be read
        _close_stdout()
        where = f" ({error.filename})" if error.filename else ""
        return _failed(f"{error.strerror or error}{where}.")
    except (MemoryError, RuntimeError) as error:
        # torch has a type of its own for the memory of GPUs alone
        if not isinstance(error, MemoryError) and not re.search(
            "out of memory|allocate memory|(calculation|multiplication) overflow", str(error)
        ):
            raise
        return _failed(f"the memory is too small for this: {' '.join(str(error).split())[:300]}")


def _failed(text: str, code: int = 2) -> int:
    print(f"tokenmerge: {text}", file=sys.stderr)
    return code


def _close_stdout() -> None:
    """Let what is left in the buffer go nowhere: Python would try once more at its end, and complain."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
