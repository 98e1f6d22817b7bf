"""The page of results: rows as a plot to point at, tables that sort and filter, notes and environment, in one file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from string import Template
from typing import Any

from tokenmerge.report.axes import COLOURS, Chart, axis_of, error_of, free_bound, front, limits, number, unmerged_level
from tokenmerge.report.formats import as_csv, html_table, with_environment
from tokenmerge.report.page import as_page, asset, escaped, paragraphs

__all__ = ["results_page"]

Row = Mapping[str, Any]
_WARNS = "WARNING"


def results_page(
    title: str,
    rows: Sequence[Row],
    *,
    environment: Mapping[str, Any] | Sequence[Row],
    notes: Sequence[str] = (),
    lead: Sequence[str] = (),
    chart: Chart | None = None,
    shown: Sequence[Row] | None = None,
    more: Mapping[str, Sequence[Row]] | None = None,
) -> str:
    """Return one HTML file that needs no network.

    Args:
        title: of the page.
        rows: with equal keys; what is drawn, and the CSV. Without any there is no plot.
        environment: the machine and the versions, of all rows or one per row.
        notes: sentences below the tables; warnings stand above.
        lead: sentences at the top.
        chart: which columns are drawn; without it there is no plot.
        shown: the rows as the table shows them, in the same order; by default `rows`.
        more: further tables by their titles.
    """
    tables: dict[str, tuple[Sequence[Row], Sequence[Row]]] = {}
    if rows:
        tables["Rows"] = shown or rows, with_environment(rows, environment)
    tables |= {name: (part, part) for name, part in (more or {}).items() if part}
    urgent = [note for note in notes if note.startswith(_WARNS)]
    others = [note for note in notes if note not in urgent]
    drawn = None if chart is None else _drawn(chart, rows)
    body = Template(asset("results.html")).substitute(
        title=escaped(title),
        lead="\n".join([paragraphs(urgent, "note"), paragraphs(lead)]),
        plot=asset("plot.html") if drawn else "",
        tables="\n".join(_section(i, name, part[0]) for i, (name, part) in enumerate(tables.items())),
        notes=f'<section aria-labelledby="notes"><h2 id="notes">Notes</h2>\n{paragraphs(others)}</section>'
        if others
        else "",
        environment=_places(environment),
    )
    data = {
        "tables": [
            {"keys": [[_key(value) for value in row.values()] for row in part], "csv": as_csv(whole)}
            for part, whole in tables.values()
        ],
        "chart": drawn,
    }
    # a library that is well kept, with its licence; it draws into a canvas and puts no style into the page
    script = (asset("chart.js") if drawn else "") + asset("results.js")
    return as_page(title, body, style=asset("results.css"), script=script, data=data)


def _key(value: Any) -> float | str | None:
    """Return what a cell is sorted by."""
    return number(value) if isinstance(value, (int, float, type(None))) else str(value)


def _section(i: int, name: str, rows: Sequence[Row]) -> str:
    """Return a table, to which the script adds what sorts and filters it."""
    table = f'<div class="table" tabindex="0" role="region" aria-labelledby="rows-{i}">{html_table(rows)}</div>'
    return f'<section class="rows">\n<h2 id="rows-{i}">{escaped(name)}</h2>\n{table}\n</section>'


def _places(environment: Mapping[str, Any] | Sequence[Row]) -> str:
    """Return the environments as lists, each with the number of rows that it is of."""
    every: list[Row] = [environment] if isinstance(environment, Mapping) else list(environment)
    each = [one for i, one in enumerate(every) if one not in every[:i]]
    found = []
    for one in each:
        terms = "".join(f"<dt>{escaped(name)}</dt><dd>{escaped(value)}</dd>" for name, value in one.items())
        count = every.count(one)
        found += [f"<h3>{count} row{'s' if count != 1 else ''}</h3>"] if len(each) > 1 else []
        found.append(f"<dl>{terms}</dl>")
    return "\n".join(found)


def _drawn(chart: Chart, rows: Sequence[Row]) -> dict[str, Any] | None:
    """Return what the script draws; None where the rows have nothing for one of the axes."""
    x, y = ([_axis(title, rows) for title in some if _is_known(title, rows)] for some in (chart.x, chart.y))
    if not x or not y:
        return None
    measured = [row for row in rows if any(number(row.get(axis["title"])) is not None for axis in y)]
    names = list(dict.fromkeys(chart.series(row) for row in measured if not chart.is_unmerged(row)))
    places = {name: i for i, name in enumerate(names)}
    fronts = {f"{a['title']}|{b['title']}": _front(rows, b["title"], a["title"]) for a in x for b in y}
    return {
        "x": x,
        "y": y,
        "labels": [chart.label(row) for row in rows],
        "names": names,
        "series": [-1 if chart.is_unmerged(row) else places.get(chart.series(row)) for row in rows],
        "isJoined": chart.is_joined,
        "isNamed": chart.is_named,
        "fronts": {} if chart.is_joined else fronts,
        "colours": COLOURS,
    }


def _is_known(title: str, rows: Sequence[Row]) -> bool:
    return any(row.get(title) is not None for row in rows)


def _front(rows: Sequence[Row], quality: str, column: str) -> list[int]:
    known = [row for row in rows if number(row.get(quality)) is not None and number(row.get(column)) is not None]
    places = {id(row): i for i, row in enumerate(rows)}
    return [places[id(row)] for row in front(known, quality, column)]


def _axis(title: str, rows: Sequence[Row]) -> dict[str, Any]:
    """Return a column as the script draws it: values, what is marked beside them, and the ends of the axis."""
    axis, values = axis_of(title), [row.get(title) for row in rows]
    found: dict[str, Any] = {"title": title, "text": axis.text, "isReversed": axis.better < 0 and not axis.is_log}
    if any(isinstance(value, str) for value in values):
        ticks = list(dict.fromkeys(str(value) for value in values if value is not None))
        places = [None if value is None else ticks.index(str(value)) for value in values]
        return {**found, "ticks": ticks, "values": places, "limits": (-0.4, len(ticks) - 0.6)}
    numbers = [value if value is None or value > 0 or not axis.is_log else None for value in map(number, values)]
    bounds, levels, errors = ([mark(row, title) for row in rows] for mark in (free_bound, unmerged_level, error_of))
    ends = [
        value + sign * (error or 0.0)
        for value, error in zip(numbers, errors, strict=True)
        if value is not None
        for sign in (1, -1)
    ]
    marks = [value for value in (*bounds, *levels) if value is not None]
    return {
        **found,
        "isLog": axis.is_log,
        "values": numbers,
        "bounds": bounds,
        "levels": levels,
        "errors": errors,
        "limits": limits(title, [*ends, *marks]) if ends else (0.5, 1.5),
    }
