"""What a job of embed wrote, each row of which must be there once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pq = pytest.importorskip("pyarrow.parquet")


def rows_of(out: Path) -> dict[str, dict[str, Any]]:
    """The rows by id, each of which must be there once."""
    found = [row for path in sorted(out.glob("embedding/part-*.parquet")) for row in pq.read_table(path).to_pylist()]
    rows = {row["id"]: row for row in found}
    assert len(rows) == len(found), "a row is there twice"
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["rows"] == len(rows) and len(manifest["shards"]) == len([*out.glob("embedding/*.parquet")])
    return rows


def failures_of(out: Path) -> dict[str, str]:
    path = out / "failures.parquet"
    found = pq.read_table(path).to_pylist() if path.exists() else []
    assert len({row["id"] for row in found}) == len(found)
    return {row["id"]: row["reason"] for row in found}


def assert_same(rows: dict[str, dict[str, Any]], expected: dict[str, dict[str, Any]], atol: float = 1e-5) -> None:
    assert rows.keys() == expected.keys()
    for name, row in rows.items():
        np.testing.assert_allclose(row["embedding"], expected[name]["embedding"], atol=atol)
        assert {**row, "embedding": 0} == {**expected[name], "embedding": 0}
