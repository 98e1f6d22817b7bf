"""Compare methods on one model: accuracy lost, MACs and time saved. An interrupted comparison can resume."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tokenmerge
from tokenmerge.config import Restore
from tokenmerge.data.labelled import Labelled, check_labelled
from tokenmerge.errors import DataError, TokenMergeError
from tokenmerge.files import write_file
from tokenmerge.measure.outputs import find_device, shared_copy
from tokenmerge.measure.timing import environment
from tokenmerge.measure.trial import BOUND, Trial
from tokenmerge.report import columns
from tokenmerge.report.axes import QUALITY, Chart
from tokenmerge.report.columns import Record
from tokenmerge.report.journal import Journal
from tokenmerge.report.plots import plot_pareto, require_viz
from tokenmerge.report.results import results_page
from tokenmerge.report.table import Table, as_csv, as_latex, as_markdown, check_writable, plain
from tokenmerge.schedule import R
from tokenmerge.tools.models import AUTO, Method, Trained, apply_method, own_r, read_method, short_name

__all__ = ["ALL", "Comparison", "ComparisonRow", "compare"]

ALL = "all"
RS: tuple[R, ...] = (8, 13, 16)
_UNMERGED = "unmerged"
_VERSION = 2
_MEASURED = "GMACs"  # every row with figures has this column
_MEANING = (
    "Agreement and KL divergence are with the unmerged model; ± is the standard error of the accuracy; GMACs are of "
    "one image, those of choosing tokens beside them; over bound is the time over the free bound, which drops the same "
    "tokens at no cost; tokens are what is left after the last block. Times are medians of interleaved rounds on one "
    "batch of {batch}."
)


class ComparisonRow(Record):
    """A method at one amount. Figures that do not apply are None; a row without figures gives the reason in `note`."""

    __slots__ = ()
    method = columns.METHOD
    asked = columns.ASKED
    r = columns.R
    top1 = columns.TOP1.or_none()
    top1_error = columns.TOP1_ERROR.or_none()
    agreement = columns.AGREEMENT.or_none()
    kl = columns.KL.or_none()
    error = columns.ERROR.or_none()
    cosine = columns.COSINE.or_none()
    gmacs = columns.GMACS.or_none()
    macs_share = columns.MACS_SHARE.or_none()
    matching_gmacs = columns.MATCHING_GMACS.or_none()
    images_per_second = columns.IMAGES_PER_SECOND.or_none()
    speed_up = columns.SPEED_UP.or_none()
    over_bound = columns.OVER_BOUND.or_none()
    tokens = columns.MEAN_TOKENS.or_none()
    note = columns.NOTE


_COLUMNS = ComparisonRow.titles()
# the figures; which of the first ones apply depends on the model's outputs
FIGURES = tuple(title for title in _COLUMNS if title not in ("method", "asked", "r", "note"))


@dataclass(repr=False)
class Comparison(Table[ComparisonRow]):
    """One row per method and amount, the unmerged model first, and the environment of each row.

    A row that could not be measured has None for numbers and the reason in `note`.
    """

    title: str
    rows: list[ComparisonRow]
    environment: list[dict[str, str]]  # per row, because a resumed run may have other library versions
    images: int
    batch_size: int
    corrupt: list[str] = field(default_factory=list)
    about: list[str] = field(default_factory=list)  # the preprocessing, and caveats of the figures
    chart = Chart(
        x=("speed-up", "MACs share", "GMACs", "tokens"),
        y=QUALITY,
        label=lambda row: row["method"] if row["asked"] == "-" else f"{row['method']} {row['asked']}",
        series=lambda row: str(row["method"]),
        is_unmerged=lambda row: row["method"] == _UNMERGED,
        is_joined=False,
    )

    @property
    def marked(self) -> int:
        """Number of rows without figures."""
        return sum(row[_MEASURED] is None for row in self.rows)

    @property
    def has_numbers(self) -> bool:
        """Whether at least one method was measured."""
        return any(row[_MEASURED] is not None for row in self.rows if row["method"] != _UNMERGED)

    @property
    def table(self) -> Sequence[Mapping[str, Any]]:
        """The rows without notes and without columns that do not apply to this model."""
        empty = {name for name in FIGURES if all(row[name] is None for row in self.rows)} | {"note"}
        empty -= set() if self.has_numbers else {*FIGURES}
        return [{name: value for name, value in row.items() if name not in empty} for row in self.rows]

    @property
    def notes(self) -> list[str]:
        """The notes of the rows, once per method."""
        said: dict[tuple[str, str], list[str]] = {}
        for row in self.rows:
            if row["note"]:
                said.setdefault((row["method"], row["note"]), []).append(row["asked"])
        return [f"{method} ({', '.join(asked)}): {note}" for (method, note), asked in said.items()]

    @property
    def facts(self) -> list[str]:
        """What a reader needs to judge the figures, in sentences."""
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

    @property
    def remarks(self) -> list[str]:
        """The notes of the rows, and what a reader needs to judge the figures."""
        return [*self.notes, *self.facts]

    def _shown(self) -> list[dict[str, Any]]:
        return [{**row, "note": whole["note"]} for row, whole in zip(self.table, self.rows, strict=True)]

    def page(self, title: str) -> str:
        """Return the rows as one HTML file, each with its note."""
        shown, facts = self._shown(), [fact for fact in self.facts if not fact.startswith("Measured on: ")]
        about: dict[str, Any] = {"environment": self.environment, "notes": facts, "chart": self.chart, "shown": shown}
        return results_page(title, self.rows, **about)

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
        write_file(folder / "index.html", self.page(self.title))


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

    `methods` are anything `read_method` takes or returns; `"all"` stands for all listed methods, including `"auto"` if
    `calibrate` holds images for it. A method saved with an `r` runs once, with that `r`. A method that cannot run on
    this model gets a row with the reason.

    Each row is saved to `rows.json` in the folder when it is finished, and the next call does not measure it again.
    Rows without figures are tried again. `fresh` starts over and keeps the old file as `rows.json.old`. At the end the
    folder holds a table, a plot and a page of all rows.

    If the model's outputs are not classes of these images (embeddings, depth), they are only compared with the unmerged
    model's. `restore` is that of `patch`. Raises `DataError` before any work for a folder that holds another
    comparison.
    """
    require_viz()
    check_labelled(data)
    if rounds < 1:
        raise DataError(f"a comparison needs at least 1 timed round; got {rounds}.")
    where = find_device(device)
    tasks = _tasks(methods, rs, macs, has_images=calibrate is not None)
    folder = Path(folder)
    journal = _journal(folder, _settings(label, model, data, where, calibrate, restore), fresh)
    check_writable(folder / "table.md")
    trial: Trial | None = None
    done = sum(task.key in journal.rows for task in tasks)
    if progress is not None:
        progress(done, len(tasks))
    for task in [task for task in tasks if task.key not in journal.rows]:
        if trial is None and not task.refusal:
            trial = Trial(model, data, where, rounds=rounds, options={"restore": restore})
        row = _row(trial, task, calibrate)
        if trial is not None:
            journal.facts = {"corrupt": trial.corrupt or journal.facts["corrupt"], "note": trial.question.note}
        journal.add(task.key, {**row, "environment": {**environment(where), "rounds": str(rounds)}})
        done += 1
        if progress is not None:
            progress(done, len(tasks))
    found = _comparison(label, data, journal, [task.key for task in tasks])
    found.write(folder)
    return found


def _journal(folder: Path, settings: dict[str, Any], fresh: bool) -> Journal:
    """Return the journal of the folder; rows without figures are removed, to be tried again."""
    journal = Journal(
        folder / "rows.json",
        "comparison",
        settings,
        version=_VERSION,
        columns={*_COLUMNS, "environment"},
        hint="Give another folder (--out), or start over (--fresh), which keeps it as rows.json.old.",
        facts={"corrupt": [], "note": ""},  # images left out, and why accuracy does not apply ("" if it does)
        fresh=fresh,
    )
    journal.rows = {key: row for key, row in journal.rows.items() if row[_MEASURED] is not None}
    return journal


def _comparison(label: str, data: Labelled, journal: Journal, asked: Sequence[str]) -> Comparison:
    """Return the comparison in the folder, the requested rows first."""
    rows = list({**{key: journal.rows[key] for key in asked}, **journal.rows}.values())
    corrupt, note = journal.facts["corrupt"], journal.facts["note"]
    return Comparison(
        title=f"{label} on {len(data) - len(corrupt)} images of {data.source}",
        rows=[ComparisonRow({name: row[name] for name in _COLUMNS}) for row in rows],
        environment=[row["environment"] for row in rows],
        images=len(data) - len(corrupt),
        batch_size=data.batch_size,
        corrupt=corrupt,
        about=[*data.preprocessing.notes(), *data.notes, *([note] if note else [])],
    )


@dataclass(frozen=True)
class _Task:
    """One row to measure: a method as the user named it, and its amount."""

    text: str
    asked: str
    method: Method
    identity: str  # the same for all names of a method
    r: R | None = None
    share: float | None = None
    refusal: str = ""  # the error, if there is no such method

    @property
    def key(self) -> str:
        return f"{self.identity}, {self.asked}"


def _tasks(
    methods: Sequence[Method], rs: Sequence[R] | None, macs: Sequence[float] | None, has_images: bool
) -> list[_Task]:
    """Return the requested rows without duplicates, the unmerged model first."""
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
    """Return the settings common to all rows of a folder."""
    weights = (part for name, x in model.state_dict().items() for part in (name.encode(), _bytes(x)))
    return {
        "model": label,
        "weights": _digest(weights),
        "data": str(Path(data.source).resolve()) if Path(data.source).is_dir() else data.source,
        "images": len(data),
        "preprocessing": str(data.preprocessing),
        "restore": str(restore),
        "batch size": data.batch_size,
        "device": str(where),
        "calibrate": "none" if calibrate is None else f"{len(calibrate)} images {_digest([_bytes(calibrate)])}",
    }


def _row(trial: Trial | None, task: _Task, calibrate: Tensor | None) -> dict[str, Any]:
    """Return one row; an error of a method on this model becomes its note."""
    row: dict[str, Any] = {**dict.fromkeys(_COLUMNS), "method": task.text, "asked": task.asked, "r": "-", "note": ""}
    if trial is None or task.refusal:
        return {**row, "note": task.refusal}
    if task.method == _UNMERGED:
        return row | _of_table(trial.unmerged())

    def reduce(method: Method, r: R | None) -> nn.Module:
        twin = shared_copy(trial.model)
        apply_method(twin, method, r=r, calibrate=calibrate, **trial.options)
        return twin

    try:
        r = task.r
        if task.share is not None:
            # "auto" gets the r of tome
            r = trial.smallest_r(partial(reduce, "tome" if task.method == AUTO else task.method), task.share)
        return row | _of_table(trial.measure(reduce(task.method, r)))
    except RuntimeError as error:
        return {**row, "note": " ".join(str(error).split()) or type(error).__name__}


def _of_table(figures: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in figures.items() if name in _COLUMNS}


def _identity(method: Method) -> str:
    """Return a key of a method, including learned weights: a rewritten file is another method."""
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
