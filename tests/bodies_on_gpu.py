"""Bodies of steps for tests of the script that runs them, in a process that imports no torch for them."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

MACHINE = {"device": "a card", "torch": "2", "driver_version": "5", "cuda": "1", "triton": "3", "python": "3"}


def machine(job: Any, say: Any, **other: str) -> None:
    say({**MACHINE, "timm": "1", "tokenmerge": "0", **other})


def good(job: Any, say: Any) -> None:
    say({"what": "good", "when": time.time_ns(), "kernels": job.kernels})


def wrong(job: Any, say: Any) -> None:
    say({"what": "first", "result": "right"})
    say({"what": "second", "result": "WRONG"})


def raises(job: Any, say: Any) -> None:
    say({"what": "before"})
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def dies(job: Any, say: Any) -> None:
    print("about to die")
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs(job: Any, say: Any) -> None:
    say({"what": "before"})
    time.sleep(600)


def nothing(job: Any, say: Any) -> None:
    pass


def only_without_triton(job: Any, say: Any) -> None:
    if job.kernels == "triton":
        raise RuntimeError("no shared memory left")
    good(job, say)
