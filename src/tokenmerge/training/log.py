"""Metrics of a run: JSON lines, the same rows as CSV, and optionally TensorBoard."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tokenmerge.data.loader import Batch
from tokenmerge.errors import DataError, TokenMergeError, UnsupportedError
from tokenmerge.files import write_file
from tokenmerge.report.table import as_csv

__all__ = ["COLUMNS", "Log", "Unreadable", "format_r", "peak_mb", "read_rows", "writing"]

# every row has all of these; unknown values are null
COLUMNS = [
    *("step", "split", "loss", "accuracy", "r", "tokens", "lr", "gradient", "scale"),
    *("images_per_second", "peak_memory_mb", "seconds"),
]


_LINES = "metrics.jsonl"


class Log:
    """`metrics.jsonl` and `metrics.csv` in the folder of a run.

    When a run is resumed, rows after the checkpoint at `step` are dropped, because those steps run again. Rows of an
    interrupted last evaluation (at `steps`) are dropped too.
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
        """Write one row; the keys of `values` are names from `COLUMNS`."""
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
        """Write all rows to `metrics.csv`."""
        with writing(self.folder):
            if self.rows:
                write_file(self.folder / "metrics.csv", as_csv(self.rows))
            if self._writer is not None:
                self._writer.flush()


class Unreadable:
    """Say once, in every process, which samples cannot be read."""

    def __init__(self, sentences: Iterable[str] = ()) -> None:
        self.sentences = dict.fromkeys(sentences)

    def __call__(self, batch: Batch) -> None:
        for sentence in batch.unreadable:
            if sentence not in self.sentences:
                self.sentences[sentence] = None
                print(f"left out, {len(self.sentences)} so far: {sentence}", file=sys.stderr, flush=True)


def format_r(r: Any) -> Any:
    """Return a pair as recipes write it, any other r unchanged."""
    return ",".join(f"{number:g}" for number in r) if isinstance(r, tuple) else r


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Return the complete metric rows of a run; the last line may be truncated."""
    path = folder / _LINES
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Raise `DataError` if the body cannot write to the folder of a run."""
    try:
        yield
    except TokenMergeError:
        raise
    except Exception as error:  # safetensors errors derive directly from Exception
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
    # hides events that an interrupted run wrote after its checkpoint
    return SummaryWriter(str(folder), purge_step=step + 1)


def peak_mb(device: torch.device) -> float | None:
    """Return the peak memory of the process so far, in MB: GPU memory on a GPU, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return None
    # ru_maxrss is in kilobytes, on macOS in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
