"""The card of a merging model: what it is, what was measured, how it is used; the README.md of a hub repository."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from tokenmerge import MergeConfig, Schedule, __version__

__all__ = ["model_card"]

_PAGE = """\
---
{head}
---

# {name}

<!-- Written by tokenmerge {version}. No license is given: add `license:` above, as the base model allows. -->

A vision transformer that merges similar tokens inside its blocks (token merging): fewer tokens, less time, the same
interface. {about}

```python
import tokenmerge

model = tokenmerge.from_pretrained("{name}")  # the id of this repository, or a folder
answers = model(images)
```

`tokenmerge.unpatch(model)` gives the unmerged model back, and `tokenmerge.handle_of(model).r = 0` switches merging off.

| configuration | |
| --- | --- |
{settings}

## Measured

{measured}
"""


def model_card(config: MergeConfig, host: str, name: str) -> str:
    """Return the text of the card, with YAML in front as the hub reads it."""
    model = config.fingerprint
    head: dict[str, Any] = {"library_name": host or "tokenmerge"}
    if model and model.base and "/" in model.base:
        head["base_model"] = model.base
    head["tags"] = ["token-merging", "tokenmerge"]
    settings: dict[str, Any] = {"method": repr(config.method), "r": repr(config.r)}
    if model:
        settings |= {"model": model.architecture, "weights from": model.base or "this folder", "blocks": model.depth}
        if model.input_size:
            settings["input"] = " x ".join(map(str, model.input_size))
        if model.tokens is not None:
            schedule = Schedule.of(config.r, model.depth, config.multiple_of, config.method.largest_r)
            left = schedule.tokens(model.tokens, model.protected)
            settings["tokens after each block"] = f"{' '.join(map(str, left))} (of {model.tokens})"
    measured = _table({"figure": "value", **dict(_flat(config.measured))}) if config.measured else ""
    return _PAGE.format(
        head="\n".join(f"{key}: {json.dumps(value)}" for key, value in head.items()),
        name=name,
        version=__version__,
        about="The base model's weights are used as they are." if model and model.base else "",
        settings="\n".join(_rows(settings)),
        measured=measured or "Nothing was measured yet: `tokenmerge tune`, `eval` and `bench` do.",
    )


def _flat(figures: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in figures.items():
        if isinstance(value, Mapping):
            yield from _flat(value)
        else:
            yield name, f"{value:g}" if isinstance(value, float) else value


def _table(rows: Mapping[str, Any]) -> str:
    first, *rest = _rows(rows)
    return "\n".join([first, "| --- | --- |", *rest])


def _rows(rows: Mapping[str, Any]) -> Iterator[str]:
    for name, value in rows.items():
        cells = (" ".join(str(part).split()).replace("|", "\\|") for part in (name, value))
        yield f"| {' | '.join(cells)} |"
