"""The how-tos of docs/trainers.md, run as they stand."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "trainers.md"
SECTIONS = {part.split("\n")[0]: part for part in PAGE.read_text().split("\n## ")[1:]}
NEEDS = {"Hugging Face Trainer": ("transformers", "accelerate"), "Lightning": ("lightning", "timm")}


def test_every_how_to_is_run() -> None:
    assert {name for name, part in SECTIONS.items() if "```" in part} == NEEDS.keys()


# what the hosts say to a machine with no GPU, few cores and little data, and of a newer torch
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator:UserWarning")
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers:UserWarning")
@pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval:UserWarning")
@pytest.mark.parametrize("name", NEEDS)
def test_a_how_to_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = [library for library in NEEDS[name] if find_spec(library) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    blocks = [part.split("```")[0] for part in SECTIONS[name].split("```py\n")[1:]]
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks:
        exec(compile(block, f"{PAGE.name}, {name}", "exec"), names)
    assert "tokenmerge" in names and (tmp_path / "trained").exists() is (name != "Lightning")
