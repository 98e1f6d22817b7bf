"""Metrics of a run: one JSON line each, the same as CSV, and TensorBoard where it is wanted."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tokenmerge.errors import DataError, TokenMergeError, UnsupportedError
from tokenmerge.files import write_file
from tokenmerge.report.table import as_csv

__all__ = ["COLUMNS", "Log", "peak_mb", "read_rows", "writing"]

# every line has all of them, what it does not know is null
COLUMNS = [
    *("step", "split", "loss", "accuracy", "r", "tokens", "lr", "gradient", "scale"),
    *("images_per_second", "peak_memory_mb", "seconds"),
]


_LINES = "metrics.jsonl"


class Log:
    """`metrics.jsonl` and `metrics.csv` in a run's folder.

    Lines after `step` are of a past that is repeated, and so is a last evaluation (at `steps`) that was cut off.
    """

    def __init__(self, folder: Path, step: int, steps: int, tensorboard: bool) -> None:
        self.folder = folder
        self.rows = [
            row for row in read_rows(folder) if row["step"] <= step and (row["step"] < steps or row["split"] == "train")
        ]
        with writing(folder):
            write_file(folder / _LINES, "".join(json.dumps(row) + "\n" for row in self.rows))
            self._writer = _writer(folder / "tensorboard", step) if tensorboard else None

    def add(self, step: int, split: str, **values: Any) -> dict[str, Any]:
        """Write one line; `values` are some of `COLUMNS`."""
        row = dict.fromkeys(COLUMNS) | {"step": step, "split": split} | values
        self.rows.append(row)
        with writing(self.folder):
            with (self.folder / _LINES).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            if self._writer is not None:
                for name, value in values.items():
                    if isinstance(value, (int, float)):
                        self._writer.add_scalar(f"{split}/{name}", value, step)
        return row

    def write_csv(self) -> None:
        """Write all lines as `metrics.csv`."""
        with writing(self.folder):
            if self.rows:
                write_file(self.folder / "metrics.csv", as_csv(self.rows))
            if self._writer is not None:
                self._writer.flush()


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics that are whole: the last one may be cut off."""
    path = folder / _LINES
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Raise `DataError` where something within cannot be written to a run's folder."""
    try:
        yield
    except TokenMergeError:
        raise
    except Exception as error:  # those of safetensors derive from Exception alone
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise DataError(
            f"cannot write to {folder}: {why}. What was saved before is whole; mend that and run the "
            "same command again."
        ) from error


def _writer(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UnsupportedError('save.tensorboard needs tensorboard: pip install "tokenmerge[train]"') from error
    # what an interrupted run wrote after its checkpoint is not shown
    return SummaryWriter(str(folder), purge_step=step + 1)


def peak_mb(device: torch.device) -> float | None:
    """Return what the process held at most so far: of the GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return None
    # kilobytes, but on macOS bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
