"""Metrics of a run: one JSON line each, the same as CSV, and TensorBoard where it is wanted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenmerge.errors import UnsupportedError
from tokenmerge.tools.results import as_csv, replace_text

__all__ = ["COLUMNS", "Log"]

# every line has all of them, what it does not know is null
COLUMNS = [
    *("step", "split", "loss", "accuracy", "r", "tokens", "lr", "gradient", "scale"),
    *("images_per_second", "peak_memory_mb", "seconds"),
]


class Log:
    """`metrics.jsonl` and `metrics.csv` in a run's folder.

    Lines after `step` are of a past that is repeated, and so is a last evaluation (at `steps`) that was cut off.
    """

    def __init__(self, folder: Path, step: int, steps: int, tensorboard: bool) -> None:
        self.folder = folder
        path = folder / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        # the last line may be cut off
        whole = [json.loads(line) for line in lines if line.endswith("}")]
        is_finished = (folder / "model.safetensors").is_file()
        self.rows: list[dict[str, Any]] = [
            row
            for row in whole
            if row["step"] <= step and (is_finished or row["step"] < steps or row["split"] == "train")
        ]
        # of a run that is over
        self.last = [row for row in self.rows if row["step"] == steps and row["split"] != "train"]
        replace_text(path, "".join(json.dumps(row) + "\n" for row in self.rows))
        self._writer = _writer(folder / "tensorboard", step) if tensorboard else None

    def add(self, step: int, split: str, **values: Any) -> dict[str, Any]:
        """Write one line; `values` are some of `COLUMNS`."""
        row = dict.fromkeys(COLUMNS) | {"step": step, "split": split} | values
        self.rows.append(row)
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self._writer is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._writer.add_scalar(f"{split}/{name}", value, step)
        return row

    def write_csv(self) -> None:
        """Write all lines as `metrics.csv`."""
        if self.rows:
            replace_text(self.folder / "metrics.csv", as_csv(self.rows))
        if self._writer is not None:
            self._writer.flush()


def _writer(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UnsupportedError('save.tensorboard needs tensorboard: pip install "tokenmerge[train]"') from error
    # what an interrupted run wrote after its checkpoint is not shown
    return SummaryWriter(str(folder), purge_step=step + 1)
