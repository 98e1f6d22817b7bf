from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# in a process of its own: where others have left holes, fewer tensors are asked of the system
_CODE = """
from pathlib import Path
import torch
from tokenmerge.measure.allocator import large_blocks_returned

def grown_and_left():
    before = resident()
    tensors = [torch.ones(2**20, dtype=torch.uint8) for _ in range(48)]
    grown = resident() - before
    del tensors
    print(grown >> 20, (resident() - before) >> 20)

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

with large_blocks_returned():
    grown_and_left()
    grown_and_left()
grown_and_left()
grown_and_left()
try:
    with large_blocks_returned():
        raise RuntimeError
except RuntimeError:
    grown_and_left()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator keeps what is freed")
def test_within_freed_tensors_go_back_to_the_system_and_afterwards_they_are_kept() -> None:
    done = subprocess.run([sys.executable, "-c", _CODE], capture_output=True, text=True, check=True, timeout=120)
    first, second, kept, again, after_an_error = (tuple(map(int, line.split())) for line in done.stdout.splitlines())
    for grown, left in (first, second):  # MiB, of 48 tensors of one
        assert grown > 40 and left < 4
    assert kept[1] > 40
    assert again[0] < 4 and after_an_error[0] < 4  # they have what the last ones left
