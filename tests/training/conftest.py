"""The bundled images stand for the training images, which are not bundled, and are read once."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import pytest
from torch import Tensor

from tokenmerge import assets

_read = lru_cache(assets.fashion_mnist)


@pytest.fixture(autouse=True)
def _bundled_images(monkeypatch: pytest.MonkeyPatch) -> None:
    def bundled(split: str = "test") -> tuple[Tensor, Tensor]:
        images, labels = _read("test")
        return images.clone(), labels.clone()

    monkeypatch.setattr(assets, "fashion_mnist", bundled)


@pytest.fixture
def picture_folder(tmp_path: Path) -> Path:
    """A folder of 60 training and 20 validation images in 10 classes, for processes that see no fixture."""
    from PIL import Image

    images, labels = _read("test")
    for label in range(10):
        chosen = images[labels == label][:8]
        for number, image in enumerate(chosen):
            folder = tmp_path / "pictures" / ("train" if number < 6 else "valid") / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.numpy()).save(folder / f"{number}.png")
    return tmp_path / "pictures"
