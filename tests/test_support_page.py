"""The committed page of supported models lists the registry it was made from, and the README quotes its counts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm

from promises import MODEL_TYPES
from registry import names

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "support.md").read_text()


def test_every_registered_name_is_on_the_page() -> None:
    if f"timm {timm.__version__}" not in PAGE:
        pytest.skip(f"the page was made with another timm than {timm.__version__}")
    missing = [name for name in names() if f"| `{name}` | " not in PAGE]
    assert missing == []


def test_the_counts_are_those_of_the_tables_and_the_readme_quotes_them() -> None:
    timm_count, other_count = re.findall(r"(\d+ of \d+) (?:registered names|classes and variants)", PAGE)
    rows = re.findall(r"^## (.+?)$|^\| `[^`]+` \| (supported|refused) \|", PAGE, re.MULTILINE)
    counts = {True: [0, 0], False: [0, 0]}
    heading = ""
    for title, state in rows:
        heading = title or heading
        if state and heading != MODEL_TYPES:
            counts[heading.startswith("timm ")][0] += state == "supported"
            counts[heading.startswith("timm ")][1] += 1
    assert f"{counts[True][0]} of {counts[True][1]}" == timm_count
    assert f"{counts[False][0]} of {counts[False][1]}" == other_count
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"**{timm_count} registered names" in readme and f"{other_count} classes and variants elsewhere**" in readme
    assert counts[True][0] >= 0.95 * counts[True][1]


def test_every_model_type_of_transformers_is_on_the_page() -> None:
    transformers = pytest.importorskip("transformers")
    if f"transformers {transformers.__version__}" not in PAGE:
        pytest.skip(f"the page was made with another transformers than {transformers.__version__}")
    section = PAGE.split(f"## {MODEL_TYPES}\n")[1].split("\n## ")[0]
    for name in ("clip", "whisper", "videomae", "swin", "resnet"):
        assert f"| `{name}` | " in section
    states = re.findall(r"^\| `[^`]+` \| ([a-z ]+) \|", section, re.MULTILINE)
    merging = states.count("supported")
    assert f"transformers: {merging} of {len(states)} model types" in PAGE
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"all {len(states)} model types of transformers that take images, sound or video: {merging} merge" in readme
