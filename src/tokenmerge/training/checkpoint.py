"""Checkpoints: write them atomically, keep the last few, load the newest readable one."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Any

import torch

from tokenmerge.errors import DataError
from tokenmerge.files import replacing

__all__ = ["Checkpoints"]


class Checkpoints:
    """The checkpoints of one run (`step-00000200.pt`, ...) in their own folder."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def paths(self) -> list[Path]:
        """Return the checkpoint files, newest first."""
        return sorted(self.folder.glob("step-*.pt"), reverse=True)

    def save(self, step: int, content: dict[str, Any]) -> Path:
        """Write a checkpoint, then delete the oldest beyond `keep`; raise `DataError` if it cannot be written.

        The file gets its final name only after it is complete and synced to disk: a crash or a full disk leaves the
        older files intact.
        """
        path = self.folder / f"step-{step:08d}.pt"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(path) as part, part.open("wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
        # torch reports a failed write as a RuntimeError of its zip writer
        except (OSError, RuntimeError) as error:
            raise DataError(self._failed(path, error)) from error
        for old in self.paths()[self.keep :]:
            old.unlink()
        return path

    def load(self) -> dict[str, Any] | None:
        """Return the newest readable checkpoint, or None if there are no checkpoints.

        Raises `DataError` if there are checkpoints and none can be read.
        """
        unread = []
        for path in self.paths():
            try:
                content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
                return content
            except Exception as error:  # a broken pickle can raise any exception
                unread.append(f"{path}: {type(error).__name__} {error}".splitlines()[0])
                print(f"skipped a checkpoint that cannot be read: {unread[-1]}", file=sys.stderr, flush=True)
        if unread:
            raise DataError(
                f"none of {len(unread)} checkpoints in {self.folder} can be read; the newest: {unread[0]}. "
                "Give another folder (--out) to start anew."
            )
        return None

    def _failed(self, path: Path, error: Exception) -> str:
        cause: BaseException = error
        while not isinstance(cause, OSError) and (cause.__cause__ or cause.__context__):
            cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
        full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
        why = "the disk is full" if full else str(cause).splitlines()[0]
        kept = self.paths()
        left = f"The last good checkpoint is {kept[0]}" if kept else "There is no earlier checkpoint"
        return f"could not write the checkpoint {path}: {why}. {left}; make room and run the same command again."
