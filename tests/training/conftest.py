"""What every test of training has: the bundled images as training images, and a folder of pictures."""

from __future__ import annotations

from pathlib import Path

import pytest

from tokenmerge import assets


@pytest.fixture(autouse=True)
def _bundled_images(bundled_images: None) -> None:
    """Training images are never read from this machine."""


@pytest.fixture
def picture_folder(tmp_path: Path) -> Path:
    """A folder of 60 training and 20 validation images in 10 classes, for processes that see no fixture."""
    from PIL import Image

    images, labels = assets.fashion_mnist("test")
    for label in range(10):
        chosen = images[labels == label][:8]
        for number, image in enumerate(chosen):
            folder = tmp_path / "pictures" / ("train" if number < 6 else "valid") / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.numpy()).save(folder / f"{number}.png")
    return tmp_path / "pictures"
