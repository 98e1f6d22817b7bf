"""The notebooks run as they are committed, and their outputs are there to read."""

from __future__ import annotations

from pathlib import Path

import pytest

nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytestmark = pytest.mark.slow

NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples").glob("*.ipynb"))


def test_there_are_notebooks() -> None:
    assert {path.stem for path in NOTEBOOKS} >= {"quick_start", "tune", "compare", "dense_features"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_prints_what_is_committed(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Figures of time differ from machine to machine: the kinds of output of every cell are compared."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # threads of a kernel beside other tests wait for each other
    committed, notebook = (nbformat.read(path, 4) for _ in range(2))
    nbclient.NotebookClient(notebook, timeout=280, resources={"metadata": {"path": str(tmp_path)}}).execute()
    code = [(old, new) for old, new in zip(committed.cells, notebook.cells, strict=True) if old.cell_type == "code"]
    assert sum(bool(old.outputs) for old, _ in code) >= len(code) / 2
    for old, new in code:
        assert _kinds(old) == _kinds(new), old.source


def _kinds(cell: object) -> set[str]:
    outputs = cell.outputs  # type: ignore[attr-defined]
    return {output.output_type for output in outputs if output.get("name") != "stderr"}
