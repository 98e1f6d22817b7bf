"""Where merged ViTs stand among other models: accuracies as published, speed measured here, in one run.

images   ViT-Ti/S/B/L of AugReg and MAE, unmerged and at the ToMe paper's r, beside Swin, Hiera and ConvNeXt
video    spatiotemporal MAE's ViT-L at the paper's r, beside torchvision's Swin3D

Writes `results/equal-accuracy-PART.*` and a plot. All models run in turn in the same rounds, with random weights. No
accuracy is measured here: each has its source.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import timm
import torch
from tables import RESULTS, write
from torch import Tensor, nn

import tokenmerge
from tokenmerge.measure.outputs import shared_copy
from tokenmerge.measure.timing import environment, interleave

TOME = "ToMe, arXiv:2210.09461"
SWIN, HIERA, CONVNEXT = "Swin, arXiv:2103.14030", "Hiera, arXiv:2306.00989", "ConvNeXt, arXiv:2201.03545"


@dataclass(frozen=True)
class Point:
    """A model as published: its name in timm or torchvision, `r`, top-1 in percent, what it was trained on, and where
    that is written."""

    family: str
    name: str
    top1: float
    data: str
    source: str
    r: int = 0

    @property
    def key(self) -> str:
        return f"{self.name} r {self.r}"


def _vit(name: str, data: str, accuracies: dict[int, float]) -> list[Point]:
    family = "ViT, MAE" if data == "ImageNet-1k, MAE" else "ViT, AugReg"
    return [Point(family, name, top1, data, TOME, r) for r, top1 in accuracies.items()]


IMAGES = [
    *_vit("vit_tiny_patch16_224", "ImageNet-21k", {0: 75.50, 8: 74.76, 13: 73.04, 16: 70.79}),
    *_vit("vit_small_patch16_224", "ImageNet-21k", {0: 81.41, 8: 80.78, 13: 79.30, 16: 77.01}),
    *_vit("vit_base_patch16_224", "ImageNet-21k", {0: 84.57, 8: 83.94, 13: 82.60, 16: 80.38}),
    *_vit("vit_large_patch16_224", "ImageNet-21k", {0: 85.82, 4: 85.37, 7: 84.26, 8: 83.55}),
    *_vit("vit_base_patch16_224.mae", "ImageNet-1k, MAE", {0: 83.62, 8: 82.93, 13: 81.41}),
    *_vit("vit_large_patch16_224.mae", "ImageNet-1k, MAE", {0: 85.66, 4: 85.39, 8: 83.92}),
    Point("Swin", "swin_tiny_patch4_window7_224", 81.3, "ImageNet-1k", SWIN),
    Point("Swin", "swin_small_patch4_window7_224", 83.0, "ImageNet-1k", SWIN),
    Point("Swin", "swin_base_patch4_window7_224", 83.5, "ImageNet-1k", SWIN),
    Point("Hiera", "hiera_tiny_224", 82.8, "ImageNet-1k, MAE", HIERA),
    Point("Hiera", "hiera_small_224", 83.8, "ImageNet-1k, MAE", HIERA),
    Point("Hiera", "hiera_base_224", 84.5, "ImageNet-1k, MAE", HIERA),
    Point("Hiera", "hiera_large_224", 86.1, "ImageNet-1k, MAE", HIERA),
    Point("ConvNeXt", "convnext_tiny", 82.1, "ImageNet-1k", CONVNEXT),
    Point("ConvNeXt", "convnext_small", 83.1, "ImageNet-1k", CONVNEXT),
    Point("ConvNeXt", "convnext_base", 83.8, "ImageNet-1k", CONVNEXT),
    Point("ConvNeXt", "convnext_large", 84.3, "ImageNet-1k", CONVNEXT),
]

VIDEO = [
    *(Point("ViT-L, MAE", "st-mae-vit-l", top1, "Kinetics-400, MAE", TOME, r) for r, top1 in ((0, 84.7), (65, 84.5))),
    *(Point("Swin3D", f"swin3d_{size}", 0.0, "Kinetics-400", "torchvision's weights") for size in ("t", "s", "b")),
]


def main() -> None:
    """Measure one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("images", "video"))
    parser.add_argument("--batch", type=int, help="images, or clips (8, 1)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (%(default)s)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    points = IMAGES if arguments.part == "images" else _published(VIDEO)
    batch = arguments.batch or (8 if arguments.part == "images" else 1)
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    shape = (3, 224, 224) if arguments.part == "images" else (3, 16, 224, 224)
    x = torch.randn(batch, *shape, device=device, dtype=dtype)
    calls = {point.key: partial(_run, _model(point).to(device, dtype), x) for point in points}
    timed = interleave(calls, device, rounds=arguments.rounds)
    rows = [
        {
            "model": point.name,
            "r": point.r,
            "top-1 % (published)": point.top1,
            "trained on": point.data,
            "images/s": round(batch / timed[point.key].median, 2),
            "source": point.source,
        }
        for point in points
    ]
    notes = [
        "Accuracies are those that were published, with the source of each; speeds were measured here, all in turn in "
        f"the same rounds, batch {batch}, {arguments.dtype}. Models of ImageNet-21k were trained on more images."
    ]
    name = f"equal-accuracy-{arguments.part}" + ("" if device.type == "cpu" else f"-{device.type}")
    write(name, "Merged ViTs among other models", rows, environment(device), notes)
    _draw(points, [row["images/s"] for row in rows], RESULTS / f"{name}.png", f"batch {batch}, {arguments.dtype}")


@torch.inference_mode()
def _run(model: nn.Module, x: Tensor) -> Any:
    return model(x)


@cache
def _unmerged(name: str) -> nn.Module:
    """Return a model with random weights; its merged copies share them."""
    if name == "st-mae-vit-l":
        return _st_mae().eval()
    if name.startswith("swin3d"):
        from torchvision.models import get_model

        return get_model(name).eval()  # type: ignore[no-any-return]
    return timm.create_model(name.removesuffix(".mae"), pretrained=False).eval()


def _model(point: Point) -> nn.Module:
    model = shared_copy(_unmerged(point.name))
    if point.r:
        tokenmerge.patch(model, r=point.r)
    return model


def _st_mae() -> nn.Module:
    """Return a ViT-L of spatiotemporal MAE's shape: 1,568 tubelets of 2 x 16 x 16 and a class token."""
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification

    config = VideoMAEConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, num_labels=400
    )
    return _Clips(VideoMAEForVideoClassification(config))


class _Clips(nn.Module):
    """Takes clips `[B, C, T, H, W]` as torchvision's models do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.model(x.transpose(1, 2)).logits
        return found


def _published(points: list[Point]) -> list[Point]:
    """Fill in the accuracies that torchvision states for its weights."""
    from torchvision.models import get_model_weights

    def stated(name: str) -> float:
        return float(get_model_weights(name).KINETICS400_V1.meta["_metrics"]["Kinetics-400"]["acc@1"])

    return [point if point.top1 else replace(point, top1=stated(point.name)) for point in points]


def _draw(points: list[Point], speeds: list[float], path: Any, where: str) -> None:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 5))
    families = dict.fromkeys(point.family for point in points)
    for family, marker in zip(families, "osD^vPX", strict=False):
        mine = [(s, p) for s, p in zip(speeds, points, strict=True) if p.family == family]
        (line,) = axis.plot([], [], marker=marker, linestyle="", label=family)
        for name in dict.fromkeys(p.name for _, p in mine):
            curve = [(s, p.top1) for s, p in mine if p.name == name]
            axis.plot(*zip(*curve, strict=True), marker=marker, color=line.get_color(), linewidth=1)
        if not family.startswith("ViT"):
            curve = sorted((s, p.top1) for s, p in mine)
            axis.plot(*zip(*curve, strict=True), color=line.get_color(), linewidth=1, linestyle=":")
    for speed, point in zip(speeds, points, strict=True):
        text = f"r = {point.r}" if point.r else point.name.split("_patch")[0].split("_224")[0]
        axis.annotate(text, (speed, point.top1), textcoords="offset points", xytext=(4, 4), fontsize=7)
    axis.set(xscale="log", xlabel=f"images/s, measured ({where})", ylabel="top-1 %, as published")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
