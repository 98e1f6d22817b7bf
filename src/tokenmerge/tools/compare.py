"""Compare methods on one model: what each costs in accuracy and gains in MACs and time. Cut off, it can go on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tokenmerge
from tokenmerge.config import Restore
from tokenmerge.data.labelled import FASHION_MNIST, Labelled
from tokenmerge.errors import DataError, TokenMergeError
from tokenmerge.files import write_file
from tokenmerge.measure.outputs import find_device
from tokenmerge.measure.timing import environment
from tokenmerge.schedule import R
from tokenmerge.tools.measure import BOUND, FIGURES, ComparisonRow, Subject
from tokenmerge.tools.models import AUTO, Method, Trained, own_r, read_method, short_name
from tokenmerge.tools.plots import plot_pareto
from tokenmerge.tools.results import Results, as_csv, as_html, as_latex, as_markdown, check_writable, plain
from tokenmerge.tools.visualize import require_viz

__all__ = ["ALL", "Comparison", "ComparisonRow", "compare"]

ALL = "all"
RS: tuple[R, ...] = (8, 13, 16)
_UNMERGED = "unmerged"
_VERSION = 2
_COLUMNS = ComparisonRow.titles()
_MEASURED = "GMACs"  # a row has it as soon as it has any figures
_MEANING = (
    "Agreement and KL divergence are with the unmerged model; ± is the standard error of the accuracy; GMACs are of "
    "one image, those of choosing tokens beside them; over bound is the time over the free bound, which drops the same "
    "tokens at no cost; tokens are what is left after the last block. Times are medians of interleaved rounds on one "
    "batch of {batch}."
)


@dataclass(repr=False)
class Comparison(Results[ComparisonRow]):
    """One row per method and amount, the unmerged model first, and what they were measured on.

    A row that could not be measured has None for numbers and the reason in `note`.
    """

    title: str
    rows: list[ComparisonRow]
    environment: list[dict[str, str]]  # of each row: runs that went on may have other versions
    images: int
    batch_size: int
    corrupt: list[str] = field(default_factory=list)
    about: list[str] = field(default_factory=list)  # how images were prepared, and what the figures cannot say

    @property
    def marked(self) -> int:
        """How many rows have no numbers."""
        return sum(row[_MEASURED] is None for row in self.rows)

    @property
    def has_numbers(self) -> bool:
        """Whether any method could be measured."""
        return any(row[_MEASURED] is not None for row in self.rows if row["method"] != _UNMERGED)

    @property
    def table(self) -> Sequence[Mapping[str, Any]]:
        """The rows without their notes, and without figures that this model has not."""
        empty = {name for name in FIGURES if all(row[name] is None for row in self.rows)} | {"note"}
        empty -= set() if self.has_numbers else {*FIGURES}
        return [{name: value for name, value in row.items() if name not in empty} for row in self.rows]

    @property
    def notes(self) -> list[str]:
        """What rows say besides numbers, once for each method that says it."""
        said: dict[tuple[str, str], list[str]] = {}
        for row in self.rows:
            if row["note"]:
                said.setdefault((row["method"], row["note"]), []).append(row["asked"])
        return [f"{method} ({', '.join(asked)}): {note}" for (method, note), asked in said.items()]

    @property
    def facts(self) -> list[str]:
        """What a reader needs to judge the numbers, in sentences."""
        machines = [", ".join(f"{name} {value}" for name, value in found.items()) for found in self.environment]
        counts = {machine: machines.count(machine) for machine in machines}
        facts = [*self.about, _MEANING.format(batch=self.batch_size)]
        if len(counts) == 1:
            facts.append(f"Measured on: {machines[0]}.")
        else:
            facts.append("The rows come from several runs that differ in what they were measured on:")
            facts += [f"{number} rows on: {machine}." for machine, number in counts.items()]
        if self.corrupt:
            facts.append(f"{len(self.corrupt)} images could not be read and were left out: {'; '.join(self.corrupt)}.")
        return facts

    def _said(self) -> list[str]:
        return [*self.notes, *self.facts]

    def _shown(self) -> list[dict[str, Any]]:
        return [{**row, "note": whole["note"]} for row, whole in zip(self.table, self.rows, strict=True)]

    def write(self, folder: Path) -> None:
        """Write `table.md`, `table.csv`, `table.tex`, the plot (PNG, SVG, PDF) and `index.html`."""
        notes = "\n".join(f"- {plain(note)}" for note in self.notes)
        facts = map(plain, self.facts)
        parts = [f"# {plain(self.title)}", as_markdown(self.table), *([notes] if notes else []), *facts]
        write_file(folder / "table.md", "\n\n".join(parts) + "\n")
        places = [", ".join(f"{name} {value}" for name, value in found.items()) for found in self.environment]
        rows = [{**row, "measured on": place} for row, place in zip(self.rows, places, strict=True)]
        write_file(folder / "table.csv", as_csv(rows))
        measured = [row for row in self.rows if row[_MEASURED] is not None]
        plot_pareto([folder / f"plot.{kind}" for kind in ("png", "svg", "pdf")], measured, self.title)
        write_file(folder / "table.tex", as_latex(self.table))
        page = as_html(self.title, self._shown(), self.facts, (folder / "plot.png").read_bytes())
        write_file(folder / "index.html", page)


def compare(
    model: nn.Module,
    data: Labelled,
    *,
    methods: Sequence[Method],
    rs: Sequence[R] | None = None,
    macs: Sequence[float] | None = None,
    folder: str | Path = "tokenmerge-compare",
    calibrate: Tensor | None = None,
    restore: Restore | None = None,
    device: str = "cpu",
    rounds: int = 10,
    fresh: bool = False,
    label: str = "model",
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Measure each method at each `r`, or at the smallest constant `r` that leaves at most a share of the MACs.

    `methods` are anything `read_method` takes or returns; `"all"` stands for every listed one, with `"auto"` where
    `calibrate` holds the images it chooses by. A method that was saved with an `r` runs once, with that one. What
    cannot run on this model is a row that says why. Each row is written to `rows.json` in the folder when it is
    finished, and the next call does not measure it again; rows without numbers are tried again, `fresh` starts over
    and keeps the old file as `rows.json.old`. At the end the folder holds a table, a plot and a page of all its rows.
    Where the model's answers are no classes of these images (embeddings, depth), they are compared with the unmerged
    model's alone. `restore` is that of `patch`. Raises `DataError` before any work for a folder that holds another
    comparison.
    """
    require_viz()
    if rounds < 1:
        raise DataError(f"a comparison needs at least 1 timed round; got {rounds}.")
    where = find_device(device)
    tasks = _tasks(methods, rs, macs, has_images=calibrate is not None)
    ledger = _Ledger(Path(folder), _settings(label, model, data, where, calibrate, restore), fresh)
    subject: Subject | None = None
    done = sum(task.key in ledger.rows for task in tasks)
    if progress is not None:
        progress(done, len(tasks))
    for task in [task for task in tasks if task.key not in ledger.rows]:
        if subject is None and not task.refusal:
            subject = Subject(model, data, where, rounds=rounds, images=calibrate, restore=restore)
        row = _row(subject, task)
        about = {**environment(where), "rounds": str(rounds)}
        if subject is not None:
            ledger.corrupt = subject.corrupt or ledger.corrupt
            ledger.note = subject.question.note
        ledger.add(task, row, about)
        done += 1
        if progress is not None:
            progress(done, len(tasks))
    found = _comparison(label, data, ledger, [task.key for task in tasks])
    found.write(ledger.folder)
    return found


def _comparison(label: str, data: Labelled, ledger: _Ledger, asked: Sequence[str]) -> Comparison:
    """Return what the folder holds, the rows that were asked for first."""
    rows = list({**{key: ledger.rows[key] for key in asked}, **ledger.rows}.values())
    return Comparison(
        title=f"{label} on {len(data) - len(ledger.corrupt)} images of {data.source}",
        rows=[ComparisonRow({name: row[name] for name in _COLUMNS}) for row in rows],
        environment=[row["environment"] for row in rows],
        images=len(data) - len(ledger.corrupt),
        batch_size=data.batch_size,
        corrupt=ledger.corrupt,
        about=[*data.preprocessing.notes(), *data.notes, *([ledger.note] if ledger.note else [])],
    )


@dataclass(frozen=True)
class _Task:
    """One row to be measured: a method as it was named, and how much it is to remove."""

    text: str
    asked: str
    method: Method
    identity: str  # what it is, whatever it was called
    r: R | None = None
    share: float | None = None
    refusal: str = ""  # why there is no such method

    @property
    def key(self) -> str:
        return f"{self.identity}, {self.asked}"


def _tasks(
    methods: Sequence[Method], rs: Sequence[R] | None, macs: Sequence[float] | None, has_images: bool
) -> list[_Task]:
    """Return the rows that are asked for, each once, the unmerged model first."""
    if rs is not None and macs is not None:
        raise DataError("give either amounts (rs, -r) or shares of the MACs (macs, --macs), not both.")
    if any(not 0 < share < 1 for share in macs or ()):
        raise DataError(f"shares of the MACs lie between 0 and 1; got {', '.join(map(str, macs or ()))}.")
    amounts: list[tuple[str, R | None, float | None]] = [(f"MACs {share:g}", None, share) for share in macs or ()]
    if macs is None:
        amounts = [(f"r {r}", r, None) for r in (RS if rs is None else rs) if r != 0]
    names = [name for name in tokenmerge.list_methods() if name != BOUND] + [AUTO] * has_images
    tasks = [_Task(_UNMERGED, "-", _UNMERGED, _UNMERGED, r=0)]
    for given in [name for method in methods for name in (names if method == ALL else [method])]:
        text = given if isinstance(given, str) else short_name(given)
        try:
            method = read_method(given) if isinstance(given, str) else given
            task = _Task(text, "as saved", method, _identity(method), r=own_r(method))
        except TokenMergeError as error:
            task = _Task(text, "-", text, f"unreadable {text}", refusal=str(error))
        if task.refusal or task.r is not None:
            tasks.append(task)
        else:
            tasks += [dataclasses.replace(task, asked=asked, r=r, share=share) for asked, r, share in amounts]
    if len(tasks) == 1:
        raise DataError("a comparison needs at least one method, and one r other than 0 or one share of the MACs.")
    return list({task.key: task for task in tasks}.values())


def _settings(
    label: str,
    model: nn.Module,
    data: Labelled,
    where: torch.device,
    calibrate: Tensor | None,
    restore: Restore | None,
) -> dict[str, Any]:
    """Return what all rows of a folder have in common."""
    weights = (part for name, x in model.state_dict().items() for part in (name.encode(), _bytes(x)))
    return {
        "model": label,
        "weights": _digest(weights),
        "data": data.source if data.source == FASHION_MNIST else str(Path(data.source).resolve()),
        "images": len(data),
        "preprocessing": str(data.preprocessing),
        "restore": str(restore),
        "batch size": data.batch_size,
        "device": str(where),
        "calibrate": "none" if calibrate is None else f"{len(calibrate)} images {_digest([_bytes(calibrate)])}",
    }


class _Ledger:
    """The rows of a folder by their keys, in a file that is whole at any time."""

    def __init__(self, folder: Path, settings: dict[str, Any], fresh: bool) -> None:
        self.folder, self.settings, self.fresh = folder, settings, fresh
        self.path = folder / "rows.json"
        self.rows: dict[str, dict[str, Any]] = {}
        self.corrupt: list[str] = []
        self.note = ""  # why labels do not count, where they do not
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"cannot write to {folder}: {error.strerror}.") from error
        check_writable(folder / "table.md")
        if self.path.exists() and not fresh:
            self._read()

    def _read(self) -> None:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            seen, self.corrupt = dict(content["settings"]), list(content["corrupt"])
            self.note = str(content["note"])
            rows = {row["key"]: row for row in content["rows"]}
            is_whole = all({*_COLUMNS, "environment"} <= {*row} for row in rows.values())
            reason = "" if content["version"] == _VERSION and is_whole else "its version or its columns are others"
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
        hint = "Give another folder (--out), or start over (--fresh), which keeps it as rows.json.old."
        if reason:
            raise DataError(f"{self.path} cannot be read as a comparison: {reason}. {hint}")
        names = [name for name in {**self.settings, **seen} if self.settings.get(name) != seen.get(name)]
        if names:
            different = "; ".join(f"{name}: asked {self.settings.get(name)}, there {seen.get(name)}" for name in names)
            raise DataError(f"{self.folder} holds a comparison with other settings ({different}). {hint}")
        # the others are tried again
        self.rows = {key: row for key, row in rows.items() if row[_MEASURED] is not None}

    def add(self, task: _Task, row: dict[str, Any], about: dict[str, str]) -> None:
        self.rows[task.key] = {"key": task.key, **row, "environment": about}
        if self.fresh and self.path.exists():
            # not before there is a row to take its place
            self.path.replace(self.path.with_name("rows.json.old"))
        self.fresh = False
        content = {"version": _VERSION, "settings": self.settings, "corrupt": self.corrupt, "note": self.note}
        write_file(self.path, json.dumps({**content, "rows": list(self.rows.values())}, indent=2) + "\n")


def _row(subject: Subject | None, task: _Task) -> dict[str, Any]:
    """Return one row; whatever keeps a method from running on this model becomes its note."""
    row: dict[str, Any] = {**dict.fromkeys(_COLUMNS), "method": task.text, "asked": task.asked, "r": "-", "note": ""}
    if subject is None or task.refusal:
        return {**row, "note": task.refusal}
    if task.method == _UNMERGED:
        return {**row, **subject.unmerged()}
    try:
        return {**row, **subject.measure(task.method, task.r, task.share)}
    except RuntimeError as error:
        return {**row, "note": " ".join(str(error).split()) or type(error).__name__}


def _identity(method: Method) -> str:
    """Return what a method is, with what it has learned: a file that was written anew is another method."""
    if isinstance(method, str):
        return method if method == AUTO else repr(tokenmerge.MergeConfig(method).method)
    config = method.config if isinstance(method, Trained) else method
    reduction = config.method if isinstance(config, tokenmerge.MergeConfig) else config
    own = method.weights if isinstance(method, Trained) else None
    files = [Path(file) for file in (getattr(reduction, "weights", None), own) if file and Path(file).is_file()]
    return " ".join([repr(config), *(_digest([file.read_bytes()]) for file in files)])


def _digest(parts: Iterable[Any]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()[:16]


def _bytes(x: Tensor) -> Any:
    """Return the bytes of a tensor, for hashing."""
    return x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
