"""Per-pixel features of photographs from a DINOv2-shaped model, unmerged and merged, as one picture.

`python examples/dense_features.py` writes docs/images/dense_features.png. The weights are random: colours show what
patch embedding and mixing make of the photograph, not what things are.
"""

from __future__ import annotations

from pathlib import Path

import skimage.data
import timm
import torch
from PIL import Image
from torch import Tensor

import tokenmerge
from tokenmerge.tools.visualize import draw_features, draw_groups, sheet

PHOTOS = ("astronaut", "chelsea", "coffee")
PATCHES = 28  # to a side
R = (0, 32, 96)


def features(model: torch.nn.Module, x: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Return the last feature map `[C, rows, columns]` and the group of each patch `[rows * columns]`."""
    with tokenmerge.patched(model, r=r, restore="dense", track=True) as handle, torch.inference_mode():
        maps = model.get_intermediate_layers(x, n=1, reshape=True, norm=True)
        groups = handle.groups[-1][0, handle.prefix :]
    return maps[0][0], groups - handle.prefix


def main(out: Path = Path("docs/images/dense_features.png")) -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch14_reg4_dinov2", depth=6, dynamic_img_size=True, num_classes=0).eval()
    rows = []
    for name in PHOTOS:
        photo = Image.fromarray(getattr(skimage.data, name)())
        side = 14 * PATCHES
        pixels = torch.frombuffer(bytearray(photo.resize((side, side)).tobytes()), dtype=torch.uint8)
        x = pixels.view(1, side, side, 3).permute(0, 3, 1, 2).float() / 127.5 - 1
        found = [features(model, x, r) for r in R]
        pictures = draw_features([maps for maps, _ in found], photo.size)
        assert all(picture.size == photo.size for picture in pictures)
        drawn = [draw_groups(photo, groups, grid=(PATCHES, PATCHES)) for _, groups in found[1:]]
        rows.append([photo, *pictures, *drawn])
    labels = ["photograph", *(f"features, r = {r}" for r in R), *(f"groups, r = {r}" for r in R[1:])]
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet(rows, labels, side=176).save(out)


if __name__ == "__main__":
    main()
