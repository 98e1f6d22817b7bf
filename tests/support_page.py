"""The page of supported models, made of what a run of the tests has found."""

from __future__ import annotations

from importlib.metadata import version

from promises import FOUND, MODEL_TYPES, Family, Row
from tokenmerge.adapters.refused import REFUSED

HOSTS = ("torch", "torchvision", "timm", "transformers", "open_clip_torch", "vit-pytorch")


def page() -> str:
    """Return the page as Markdown."""
    # timm's classes stand there by their registered names, classes that a test defines for itself nowhere
    found = {family: row for family, row in FOUND.items() if family.heading != "timm" and "<locals>" not in family.name}
    timm = {family: row for family, row in found.items() if family.heading.startswith("timm ")}
    types = {family: row for family, row in found.items() if family.heading == MODEL_TYPES}
    others = {family: row for family, row in found.items() if family not in timm and family not in types}
    lines = [
        "# What is supported",
        "",
        "Written by the tests (`make support`): a model stands here as supported because this run built it, small and",
        "with random parameters, and showed that r = 0 is the original, that as many tokens go as planned, that sizes",
        "add up, that merging and restored tokens equal the group-mean simulation, and that removal is bit-exact.",
        "",
        "Versions: " + ", ".join(f"{host} {version(host)}" for host in HOSTS) + ".",
        "",
        f"timm: {_count(timm)} registered names of its ViT modules are supported.",
        f"transformers: {_count(types)} model types that take images, sound or video are supported; the others are",
        "refused by name, each with its reason, or not yet looked at.",
        f"Elsewhere: {_count(others)} classes and variants.",
        "",
    ]
    headings = [sorted({family.heading for family in part}) for part in (timm, types, others)]
    for heading in [name for part in headings for name in part]:
        rows = {family.name: row for family, row in found.items() if family.heading == heading}
        lines += [f"## {heading}", "", f"{_count(rows)} supported.", "", *_table(rows), ""]
    lines += ["## Refused by name", "", "| class | why |", "| --- | --- |"]
    lines += [f"| `{name}` | {reason} |" for name, reason in sorted(REFUSED.items())]
    return "\n".join(lines) + "\n"


def _count(rows: dict[Family, Row] | dict[str, Row]) -> str:
    return f"{sum(row.state == 'supported' for row in rows.values())} of {len(rows)}"


def _table(rows: dict[str, Row]) -> list[str]:
    head = ["| name | state | adapter | remark |", "| --- | --- | --- | --- |"]
    return head + [
        f"| `{name}` | {row.state} | {row.adapter} | {row.remark or '-'} |" for name, row in sorted(rows.items())
    ]
