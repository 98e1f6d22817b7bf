"""Keep the allocator of glibc from distorting times and from holding memory; elsewhere nothing is done."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

__all__ = ["large_blocks_returned", "return_freed", "settle"]

_MMAP_THRESHOLD = -3  # glibc's M_MMAP_THRESHOLD: blocks from this size on come from the system, each by itself
_LARGE = 32 << 20  # bytes; the largest threshold that glibc learns from blocks that were freed
_FRESH = 128 << 10  # what glibc begins with


def settle() -> None:
    """Bring the allocator to where it is in a process that has run for a while.

    Until a block of nearly 32 MiB was freed, it gives large blocks back to the system and asks for them anew in every
    forward, page by page: an unmerged ViT took a quarter longer in a fresh process, a merged one a tenth.
    """
    torch.empty(_LARGE - (1 << 20), dtype=torch.uint8)


def return_freed() -> None:
    """Give freed memory back to the system, after forwards whose numbers of tokens will not come again.

    glibc keeps it for tensors of the same sizes; with another schedule every few forwards it grew to twice what one
    needs.
    """
    _glibc("malloc_trim", 0)


@contextmanager
def large_blocks_returned() -> Iterator[None]:
    """Within, give each tensor's memory back to the system as soon as it is freed; then settle.

    For many forwards of ever other lengths that are not timed: their tensors leave holes that no other fits, and the
    peak of the memory grew from schedule to schedule, up to three times that of one forward. Forwards take up to an
    eighth longer.
    """
    settle()  # first: glibc learns no more once it was told
    _glibc("mallopt", _MMAP_THRESHOLD, _FRESH)
    try:
        yield
    finally:
        _glibc("mallopt", _MMAP_THRESHOLD, _LARGE)


def _glibc(name: str, *arguments: int) -> None:
    with suppress(AttributeError, OSError, TypeError):
        getattr(ctypes.CDLL(None), name)(*arguments)
