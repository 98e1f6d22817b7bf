"""One small picture of every kind that is drawn: `python tests/report/golden_pictures.py` writes tests/golden/pictures.

Photo, groups and values are made here, without a model: what is compared is the drawing alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tokenmerge.report.drawing import draw_cells, draw_clip, draw_features, draw_groups, sheet
from tokenmerge.report.spectrograms import plot_groups
from tokenmerge.report.trace import BlockTrace, Trace
from tokenmerge.tools.visualize import Seen, sheet_of_blocks
from tokenmerge.tools.viz_clip import follow

FOLDER = Path(__file__).parents[1] / "golden" / "pictures"
GRID, BOX = (4, 6), (10.0, 4.0, 106.0, 68.0)
# what merged after two blocks of a model with a class token: rows of four patches
GROUPS = (
    [1, 1, 2, 3, 4, 5, 6, 1, 7, 8, 9, 9, 10, 10, 11, 12, 13, 14, 15, 16, 17, 18, 18, 18],
    [1, 1, 2, 2, 3, 4, 1, 1, 5, 6, 7, 7, 8, 8, 9, 7, 7, -1, 10, 11, 12, 13, 13, 13],
)


def photo(size: tuple[int, int] = (116, 72)) -> Any:
    """Colours that run into each other, the same on every machine."""
    W, H = size
    x, y = torch.arange(W).float() / W, torch.arange(H).float()[:, None] / H
    waves = [(6.3 * (1.3 * x + shift)).sin() * (6.3 * (0.8 * y + shift)).cos() for shift in (0.0, 0.3, 0.7)]
    return Image.fromarray((127.5 * (1 + torch.stack(waves, dim=2))).byte().numpy())


def _trace() -> Trace:
    """The pairs of `GROUPS`, each patch into the first of its group, with similarities of their own."""
    blocks, lead = [], torch.arange(25)
    for number, names in enumerate(GROUPS):
        groups = torch.tensor([0, *names])
        first = {name: (groups == name).nonzero()[0] for name in range(int(groups.max()) + 1)}
        new = torch.tensor([-1 if name < 0 else int(first[name]) for name in groups.tolist()])
        gone = torch.tensor([at for at in range(25) if lead[at] == at and new[at] != at])
        similarity = (0.95 - 0.02 * torch.arange(len(gone)) - 0.2 * number).masked_fill(new[gone] < 0, float("nan"))
        kept = (new == torch.arange(25)).nonzero().flatten()
        blocks.append(BlockTrace(gone[None], new[gone][None], similarity[None], kept[None], groups[None], False))
        lead = new
    return Trace("ToMe()", 1, GRID, tuple(blocks))


def seen(**changes: Any) -> Seen:
    """What a forward noted, by hand."""
    groups = [torch.tensor(names) for names in GROUPS]
    attention = [(torch.arange(24).float() % 7 + 1) / 94, (torch.arange(24).float() % 5 + 1) / 71]
    values: dict[str, Any] = {
        "name": "waves.png",
        "picture": photo(),
        "box": BOX,
        "is_own": True,
        "grid": GRID,
        "groups": groups,
        "tokens": [19, 14],
        "trace": _trace(),
        "prefix": 1,
        "attention": attention,
    }
    return Seen(**{**values, **changes})


def _clip() -> Any:
    frames = [photo((48 + 8 * t, 40)).crop((8 * t, 0, 8 * t + 48, 40)) for t in range(3)]
    groups = (torch.arange(18) % 5).view(3, 2, 3)
    return sheet(
        [frames, draw_clip(frames, groups, grid=(3, 2, 3), box=(4, 2, 43, 38))], ["0 s", "1 s", "2 s"], side=96
    )


def _frames() -> Any:
    groups = [torch.tensor(names) for names in ([0, 0, 1, 1, 2, 2], [5, 0, 0, 1, 1, 2], [2, 1, 1, 0, 0, 0])]
    frames = [photo((48, 32))] * 3
    drawn = [
        draw_groups(frame, one, grid=(2, 3), shades=shades)
        for frame, one, shades in zip(frames, groups, follow(groups), strict=True)
    ]
    return sheet([drawn], ["a", "b", "c"], side=96)


def _features() -> Any:
    maps = [torch.stack([(k + 1.0) * torch.linspace(-1, 1, 24).view(4, 6) ** (1 + k % 3) + shift for k in range(5)])
            for shift in (0.0, 0.2)]  # fmt: skip
    return sheet([draw_features(maps, (60, 40))], ["plain", "merged"], side=60)


def sound(path: Path) -> Any:
    """A spectrogram with its groups, through a file."""
    level = (torch.arange(16).float()[:, None] - 4 - 5 * (torch.arange(32).float() / 5).sin()).abs().neg()
    groups = torch.arange(32) // 3
    hertz = 40.0 * 1.38 ** torch.arange(16).double()
    plot_groups(path, level, groups, (4, 8), start=-0.5, seconds=2.0, hertz=hertz, title="a sound, 11 tokens")
    return Image.open(path).convert("RGB").resize((600, 360))


KINDS: dict[str, Callable[[], Any]] = {
    "groups": lambda: seen().draw(1),
    "groups-cut": lambda: seen().draw(1, cut=True),
    "groups-small": lambda: seen(picture=photo((20, 14)), box=None).draw(0),
    "size": lambda: seen().draw(1, "size"),
    "similarity": lambda: seen().draw(1, "similarity"),
    "attention": lambda: seen().draw(1, "attention"),
    "blocks": lambda: sheet_of_blocks(seen(), range(2), cut=True),
    "cells": lambda: draw_cells(torch.tensor(GROUPS[1])),
    "clip": _clip,
    "frames": _frames,
    "features": _features,
}


def as_tensor(picture: Any) -> Tensor:
    """Pixels as `[H, W, 3]` float."""
    pixels = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8)
    return pixels.view(picture.height, picture.width, 3).float()


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, draw in KINDS.items():
        draw().save(FOLDER / f"{name}.png", optimize=True)
    sound(FOLDER / "sound.png").save(FOLDER / "sound.png", optimize=True)
