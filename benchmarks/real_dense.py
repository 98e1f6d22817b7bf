"""Merging in a dense model of real weights: saliency maps merged against unmerged; write `results/real-dense.*`.

The backbone is a ViT-S/14 of DINOv2's shape, its decoder three transposed convolutions; both are files of weights
(--backbone, --decoder). Photographs are those of folders (--photographs DIR..., DIR/CLASS/*.jpg or DIR/*.jpg).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from tables import RESULTS, write
from torch import Tensor, nn

import tokenmerge
from tokenmerge.errors import DataError, TokenMergeError
from tokenmerge.measure.outputs import shared_copy
from tokenmerge.measure.timing import environment, interleave

BACKBONE = "vit_small_patch14_dinov2.lvd142m"
# tokens removed per block, by the side of the image in pixels: 257 tokens at 224, 1,370 at 518
AMOUNTS = {224: (4, 8, 12, 16), 518: (20, 50, 80)}
METHODS = ("tome", "tofu", "pitome", "least_loss", "random")
BATCH = 4


class Saliency(nn.Module):
    """A backbone and its decoder: the logits of a map `[B, 1, 8 * rows, 8 * columns]` from patch tokens."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        widths = (384, 256, 128, 64)
        for i in (1, 2, 3):
            setattr(self, f"upconv{i}", nn.ConvTranspose2d(widths[i - 1], widths[i], 4, 2, 1))
            setattr(self, f"bn{i}", nn.BatchNorm2d(widths[i]))
        self.final_conv = nn.Conv2d(64, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.backbone.forward_features(images)[:, 1:]
        side = images.shape[-1] // 14
        x = tokens.transpose(1, 2).unflatten(2, (side, side))
        for i in (1, 2, 3):
            x = getattr(self, f"bn{i}")(getattr(self, f"upconv{i}")(x)).relu()
        found: Tensor = self.final_conv(x)
        return found


def saliency(backbone: Path, decoder: Path, side: int) -> Saliency:
    """Return the model for square images of a side; raises `DataError` for weights of another model."""
    model = Saliency(timm.create_model(BACKBONE, pretrained=False, img_size=518))
    try:
        model.backbone.load_state_dict(load_file(backbone))
        model.load_state_dict(load_file(decoder), strict=False)
    except RuntimeError as error:
        raise DataError(f"weights of another model: {' '.join(str(error).split())[:300]}") from error
    model.backbone.set_input_size(img_size=side)
    return model.eval()


def photographs(folders: list[Path], side: int, limit: int) -> Tensor:
    """Return the first photographs, spread over the folders, as the model takes them: `[N, 3, side, side]`."""
    paths = sorted(path for folder in folders for path in folder.rglob("*.jpg"))
    if not paths:
        raise DataError(f"no .jpg in {', '.join(map(str, folders))}.")
    config = {"input_size": (3, side, side), "crop_pct": 1.0, "interpolation": "bicubic"}
    prepare = timm.data.create_transform(**config)
    chosen = paths[:: max(1, len(paths) // limit)][:limit]
    return torch.stack([prepare(Image.open(path).convert("RGB")) for path in chosen])


@torch.inference_mode()
def maps(model: nn.Module, images: Tensor) -> Tensor:
    """Return the saliency `[N, H, W]`, from 0 to 1."""
    return torch.cat([model(batch).sigmoid()[:, 0] for batch in images.split(BATCH)])


def differences(got: Tensor, wanted: Tensor) -> dict[str, float]:
    """Return how maps differ from the unmerged ones: error, correlation, and overlap of what is above one half."""
    a, b = got.flatten(1), wanted.flatten(1)
    inside, outside = (a > 0.5) & (b > 0.5), (a > 0.5) | (b > 0.5)
    with_any = outside.any(dim=1)
    overlap = inside.sum(1)[with_any] / outside.sum(1)[with_any]
    correlation = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(a, b, strict=True)])
    return {
        "MAE": round((a - b).abs().mean().item(), 4),
        "correlation": round(correlation.nanmean().item(), 4),
        "IoU at 0.5": round(overlap.mean().item(), 4),
        "IoU, worst": round(overlap.min().item(), 4),
    }


def main() -> None:
    """Measure each method at each r and size, and draw some maps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", type=Path, required=True, help="weights of the ViT-S/14 at 518 pixels")
    parser.add_argument("--decoder", type=Path, required=True, help="weights of the decoder")
    parser.add_argument("--photographs", type=Path, nargs="+", required=True)
    parser.add_argument("--limit", type=int, default=48, help="photographs (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (%(default)s)")
    parser.add_argument("--sides", type=int, nargs="+", default=[*AMOUNTS], choices=AMOUNTS)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    try:
        for side in arguments.sides:
            rows += _rows(saliency(arguments.backbone, arguments.decoder, side), side, arguments)
    except TokenMergeError as error:
        sys.exit(f"real_dense.py: {error}")
    notes = [
        f"Maps of {arguments.limit} photographs, merged and with every token back in its place (restore='dense'), "
        f"against the unmerged maps. Times at batch {BATCH}, of backbone and decoder."
    ]
    write("real-dense", "Merging in a dense model of real weights", rows, environment(torch.device("cpu")), notes)


def _rows(model: Saliency, side: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    images = photographs(arguments.photographs, side, arguments.limit)
    unmerged, whole = maps(model, images), tokenmerge.flops(model.backbone, (3, side, side))
    shown, rows = {"unmerged": unmerged}, []
    for name in METHODS:
        for r in AMOUNTS[side]:
            twin = shared_copy(model)
            handle = tokenmerge.patch(twin.backbone, name, r=r, restore="dense")
            got = maps(twin, images)
            calls = {"unmerged": lambda: model(images[:BATCH]), "merged": lambda twin=twin: twin(images[:BATCH])}
            timed = interleave(calls, torch.device("cpu"), rounds=arguments.rounds)
            share = tokenmerge.flops(twin.backbone, (3, side, side)) / whole
            row = {"pixels": side, "method": name, "r": r, "MACs share": round(share, 4)}
            row |= {**differences(got, unmerged), "speed-up": round(timed["unmerged"].over(timed["merged"]), 3)}
            rows.append({**row, "tokens": handle.tokens[-1]})
            print(rows[-1], flush=True)
            if name == "tome":
                shown[f"r = {r}"] = got
    _draw(images, shown, RESULTS / f"real-dense-{side}.png")
    return rows


def _draw(images: Tensor, shown: dict[str, Tensor], path: Path) -> None:
    """Draw four photographs and their maps."""
    import matplotlib.pyplot as plt

    mean, std = (
        torch.tensor(part)[:, None, None] for part in (timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD)
    )
    chosen = torch.linspace(0, len(images) - 1, 4).long().tolist()
    figure, axes = plt.subplots(len(chosen), 1 + len(shown), figsize=(2 * (1 + len(shown)), 2 * len(chosen)))
    for row, i in zip(axes, chosen, strict=True):
        row[0].imshow((images[i] * std + mean).clamp(0, 1).permute(1, 2, 0))
        for axis, found in zip(row[1:], shown.values(), strict=True):
            axis.imshow(found[i], vmin=0, vmax=1, cmap="gray")
    for axis, title in zip(axes[0], ["photograph", *shown], strict=True):
        axis.set_title(title, fontsize=9)
    for axis in axes.flat:
        axis.set_axis_off()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
