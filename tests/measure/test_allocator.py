from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch

from tokenmerge.measure.allocator import large_blocks_returned

MIB = 2**20


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def _grown_and_left() -> tuple[int, int]:
    """Return by how many bytes the process grew for 48 tensors of 1 MiB, and how many are left when they are gone."""
    before = _resident()
    tensors = [torch.ones(MIB, dtype=torch.uint8) for _ in range(48)]
    grown = _resident() - before
    del tensors
    return grown, _resident() - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator keeps what is freed")
def test_within_freed_tensors_go_back_to_the_system_and_afterwards_they_are_kept() -> None:
    with large_blocks_returned():
        grown, left = _grown_and_left()
    assert grown > 40 * MIB and left < 4 * MIB
    _grown_and_left()
    grown, _ = _grown_and_left()
    assert grown < 20 * MIB  # it has what the last ones left
    with pytest.raises(RuntimeError, match="asked"), large_blocks_returned():
        raise RuntimeError("asked")
    _grown_and_left()
    assert _grown_and_left()[0] < 20 * MIB
