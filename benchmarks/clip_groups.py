"""Clips and the groups of tubelets that a fine-tuned model makes of them: write `docs/images/clip_groups.png`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import tokenmerge
from tokenmerge.data.loader import open_source
from tokenmerge.data.transforms import eval_transform
from tokenmerge.tools.visualize import draw_clip, sheet
from tokenmerge.training.recipe import read_recipe
from tokenmerge.training.run_folder import load

ZOOM = 8  # a frame has 32 x 32 pixels
COLOURS = ("#ff3030", "#30c030", "#3080ff", "#ffc000")


def follow(frames: list[Any], groups: torch.Tensor, side: int, count: int = 4) -> list[Any]:
    """Return the frames, with the brightest groups that span several frames in colour.

    The item is bright and the canvas dark, so bright groups follow the item.
    """
    pixels = torch.stack([torch.from_numpy(np.array(frame.convert("L"))).float() for frame in frames])
    light = pixels.unfold(1, side, side).unfold(2, side, side).mean(dim=(-1, -2))  # [T, rows, columns]
    spans = [group for group in groups.unique() if (groups == group).any(dim=(1, 2)).sum() > 1]
    chosen = sorted(spans, key=lambda group: -light[groups == group].mean())[:count]
    drawn = []
    for frame, places in zip(frames, groups, strict=True):
        picture = frame.convert("RGB")
        for group, colour in zip(chosen, COLOURS, strict=False):
            mask = Image.fromarray(((places == group) * 140).byte().numpy()).resize(frame.size, Image.NEAREST)
            picture.paste(colour, mask=mask)
        drawn.append(picture)
    return drawn


def main() -> None:
    """Draw frames, groups, and the groups that follow the item, one row each, for every clip."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/video/r42-seed0"), help="%(default)s")
    parser.add_argument("--clips", type=int, nargs="+", default=[0, 1, 3], help="numbers of test clips")
    parser.add_argument("--out", type=Path, default=Path("docs/images/clip_groups.png"))
    arguments = parser.parse_args()
    recipe = read_recipe(arguments.run / "recipe.json")
    size = tuple(json.loads((arguments.run / "model.json").read_text())["size"])
    source = open_source(recipe.data.source, "test", recipe.data)
    model = load(arguments.run)
    handle = tokenmerge.handle_of(model)
    handle.track = True
    grid = model.patch_embed.grid_size
    frames_each, patch = size[1] // grid[0], size[2] // grid[1]
    rows, names = [], []
    for number in arguments.clips:
        clip, label = source.read(number)
        x = eval_transform(source.kind, size)(clip)[None]
        with torch.inference_mode():
            answer = int(model(x).argmax())
        groups = handle.groups[-1][0]
        shown = clip[::frames_each]
        frames = [Image.fromarray(frame.numpy()).resize((32 * ZOOM, 32 * ZOOM), Image.NEAREST) for frame in shown]
        rows += [frames, draw_clip(frames, groups, grid=grid, patch_size=patch * ZOOM)]
        rows.append(follow(frames, groups.view(grid), patch * ZOOM))
        names.append(f"{source.classes[label]}, classified as {source.classes[answer]}, {len(groups.unique())} tokens")
    labels = [f"frame {1 + number * frames_each}" for number in range(grid[0])]
    sheet(rows, labels, side=32 * ZOOM // 2).save(arguments.out)
    print("\n".join(names))


if __name__ == "__main__":
    main()
