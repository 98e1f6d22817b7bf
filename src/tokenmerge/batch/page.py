"""The page of a job: what bounded it, how fast it went over time, what failed and why, and what made the rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch

from tokenmerge.batch.folder import REPORT, JobFolder
from tokenmerge.batch.rates import read_rates
from tokenmerge.batch.summary import Summary
from tokenmerge.files import write_file
from tokenmerge.measure.timing import environment
from tokenmerge.report.axes import Chart
from tokenmerge.report.results import results_page

__all__ = ["write_page"]

Line = Mapping[str, Any]  # of `read_rates`
_MOST = 150  # marks of a rate: more lines are averaged
_REASONS = 50  # that are told apart
_CHART = Chart(
    x=("seconds",),
    y=("images/s", "GPU %"),
    label=lambda row: f"{row['rate of']}, {row['seconds']:.0f} s",
    series=lambda row: str(row["rate of"]),
    is_named=False,
)


def write_page(folder: JobFolder, summary: Summary, device: torch.device, batch_size: int) -> None:
    """Write `report.html` into the folder of a job: of its last call, and of the rates of all; raises `OSError`."""
    runs = _runs(read_rates(folder.folder))
    about = {**folder.settings, "device": device, "engine": summary.engine, "models": summary.models}
    about |= {"workers": summary.workers, "batch size": batch_size}
    page = results_page(
        f"tokenmerge embed {folder.settings.get('model', '')}",
        _rows(runs),
        environment=environment(device),
        lead=[summary.bound, summary.counts, summary.pace],
        notes=[*summary.notes, *_notes(summary, len(runs))],
        chart=_CHART,
        more={
            "Runs": [_run(number, run) for number, run in enumerate(runs, 1)],
            "Failures": _reasons([*folder.failures.values()]),
            "Settings": [{"setting": name, "value": str(value)} for name, value in about.items()],
        },
    )
    write_file(folder.folder / REPORT, page)


def _notes(summary: Summary, runs: int) -> list[str]:
    found = [
        "loader: what the processes that decode could do while nothing holds them up; model: what the models could do "
        "while they have images; whole job: what was done, waiting and starting included.",
    ]
    if runs > 1:
        found.append(
            f"The seconds of {runs} runs follow each other. What bounds it is said of the last one, and its engine, "
            "models, workers and batch size are named."
        )
    if summary.engine != "local":
        found.append("Measured on is the machine of the driver.")
    return found


def _runs(lines: Sequence[Line]) -> list[list[Line]]:
    """Return the lines of each call."""
    runs: list[list[Line]] = []
    for line in lines:
        last = runs[-1][-1] if runs else None
        # two calls may begin in the same second
        if last is None or line["started"] != last["started"] or line["images"] <= last["images"]:
            runs.append([])
        runs[-1].append(line)
    return runs


def _run(number: int, lines: Sequence[Line]) -> dict[str, Any]:
    seconds, images = lines[-1]["seconds"], lines[-1]["images"]
    rate = round(images / seconds, 1) if seconds else None
    return {"run": number, "started": lines[0]["started"], "images": int(images), "seconds": seconds, "images/s": rate}


def _rows(runs: Sequence[Sequence[Line]]) -> list[dict[str, Any]]:
    """Return a row for every rate that is known, over all runs, whose seconds follow each other."""
    rows, before = [], 0.0
    together = -(-sum(map(len, runs)) // _MOST)
    for number, run in enumerate(runs, 1):
        for part in _parts(run, together):
            rates = {"loader": _mean(part, "loader"), "model": _mean(part, "model"), "whole job": _whole(part)}
            load = [line["gpu"] for line in part[1:] if line["gpu"] is not None]
            for name, rate in rates.items():
                at = round(before + part[-1]["seconds"], 1)
                gpu = round(sum(load) / len(load), 1) if load and name == "model" else None
                row = {"run": number, "seconds": at, "rate of": name, "images/s": rate, "GPU %": gpu}
                rows += [row] if rate is not None else []
        before += run[-1]["seconds"]
    is_known = any(row["GPU %"] is not None for row in rows)
    return [{name: value for name, value in row.items() if is_known or name != "GPU %"} for row in rows]


def _parts(run: Sequence[Line], together: int) -> Iterator[Sequence[Line]]:
    """Yield so many lines at a time, behind the one before them."""
    whole = [{"seconds": 0.0, "images": 0.0}, *run]
    ends = [*range(0, len(run), together), len(run)]
    times = [whole[end]["seconds"] - whole[start]["seconds"] for start, end in pairwise(ends)]
    if len(times) > 1 and times[-1] < times[-2] / 2:
        del ends[-2]  # what was left at the end: too short to be measured by itself
    for start, end in pairwise(ends):
        yield whole[start : end + 1]


def _mean(part: Sequence[Line], name: str) -> float | None:
    """Return images per second of the time that they took, not the mean of the rates: slow ones take longer."""
    rates = [
        (now["images"] - before["images"], now[name])
        for before, now in pairwise(part)
        if now[name] is not None and now[name] > 0
    ]
    images = sum(count for count, _ in rates)
    return round(images / sum(count / rate for count, rate in rates), 1) if images else None


def _whole(part: Sequence[Line]) -> float | None:
    seconds = part[-1]["seconds"] - part[0]["seconds"]
    return round((part[-1]["images"] - part[0]["images"]) / seconds, 1) if seconds > 0 else None


def _reasons(failures: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Return how often images failed for which reason, the most frequent first, each with an example."""
    examples = {one["reason"]: one["id"] for one in reversed(failures)}
    counts = Counter(one["reason"] for one in failures).most_common()
    found = [{"images": count, "reason": why, "for example": examples[why]} for why, count in counts[:_REASONS]]
    rest = sum(count for _, count in counts[_REASONS:])
    others = {"images": rest, "reason": f"{len(counts) - _REASONS} other reasons", "for example": None}
    return [*found, *([others] if rest else [])]
