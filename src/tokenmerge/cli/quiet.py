"""`-q`: a command prints its result, and on stderr nothing but an error."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

__all__ = ["quiet"]


class _Nowhere(io.TextIOBase):
    """A stream that keeps nothing; unlike an open /dev/null it may outlive the command in a logger."""

    def write(self, text: str) -> int:
        return len(text)


@contextmanager
def quiet(is_quiet: bool) -> Iterator[None]:
    """Drop what is written to stderr meanwhile: progress, notes, warnings and logs below an error."""
    if not is_quiet:
        yield
        return
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stderr(_Nowhere()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
