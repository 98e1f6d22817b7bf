"""Shared by the scripts that measure on real weights: a tower, photographs in class folders, and what features tell."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import timm
import torch
from PIL import Image
from torch import Tensor, nn

import tokenmerge
from tokenmerge.errors import DataError

TOWER = "vit_base_patch16_clip_quickgelu_224.openai"
BATCH = 16
SPLITS = 3
TEMPERATURE = 30.0  # of the probe's cosines


def tower(weights: Path | None, name: str | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return CLIP's ViT-B/16 with the weights of a file, or a pretrained model of timm without its head."""
    if weights is not None:
        return tokenmerge.load(f"timm:{TOWER}/{weights}").to(dtype)
    return timm.create_model(name, pretrained=True, num_classes=0).eval().to(dtype)


@dataclass(frozen=True)
class Photographs:
    """Photographs as a tower takes them, `[N, 3, H, W]`, and the number of each one's class, `[N]`."""

    images: Tensor
    labels: Tensor

    def splits(self) -> list[tuple[Tensor, Tensor]]:
        """Return three ways to deal the photographs: half of each class to fit on, the others to test on."""
        dealt = []
        for seed in range(SPLITS):
            generator = torch.Generator().manual_seed(seed)
            fit = torch.zeros(len(self.labels), dtype=torch.bool)
            for label in self.labels.unique():
                of_class = (self.labels == label).nonzero()[:, 0]
                order = torch.randperm(len(of_class), generator=generator)
                fit[of_class[order[: len(of_class) // 2]]] = True
            dealt.append((fit.nonzero()[:, 0], (~fit).nonzero()[:, 0]))
        return dealt

    @cached_property
    def digest(self) -> str:
        """What identifies the photographs."""
        return hashlib.sha256(self.images.float().numpy().tobytes()).hexdigest()[:16]


def photographs(model: nn.Module, folders: Sequence[Path], per_class: int | None = None) -> Photographs:
    """Read DIR/CLASS/*.jpg of every folder, prepared as timm's configuration of the model says."""
    config = timm.data.resolve_data_config(model.pretrained_cfg)
    prepare = timm.data.create_transform(**{**config, "crop_pct": 1.0})
    of_class: dict[str, list[Path]] = {}
    for folder in folders:
        for path in sorted(folder.glob("*/*.jpg")):
            of_class.setdefault(path.parent.name, []).append(path)
    if len(of_class) < 2:
        raise DataError(f"no photographs in {', '.join(map(str, folders))}: give folders that hold CLASS/*.jpg.")
    images, labels = [], []
    for label, name in enumerate(sorted(of_class)):
        for path in of_class[name][:per_class]:
            images.append(prepare(Image.open(path).convert("RGB")))
            labels.append(label)
    return Photographs(torch.stack(images), torch.tensor(labels))


@torch.inference_mode()
def features(model: nn.Module, images: Tensor) -> Tensor:
    """Return the embeddings `[N, C]` of photographs, in float32 on the CPU."""
    like = next(model.parameters())
    return torch.cat([model(batch.to(like)) for batch in images.split(BATCH)]).float().cpu()


def probe(embeddings: Tensor, labels: Tensor) -> nn.Module:
    """Return a linear classifier of unit embeddings, fitted by L-BFGS with weight decay."""
    unit = nn.functional.normalize(embeddings).clone()
    fitted = nn.Linear(unit.shape[1], int(labels.max()) + 1)
    nn.init.zeros_(fitted.weight)
    nn.init.zeros_(fitted.bias)
    optimiser = torch.optim.LBFGS(fitted.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def step() -> Tensor:
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(TEMPERATURE * fitted(unit), labels)
        loss = loss + 1e-3 * fitted.weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(step)
    return fitted.requires_grad_(False)


@torch.no_grad()
def scores(fitted: nn.Module, embeddings: Tensor) -> Tensor:
    """Return the logits `[N, classes]` of a probe."""
    found: Tensor = TEMPERATURE * fitted(nn.functional.normalize(embeddings))
    return found


def by_means(fit: Tensor, labels: Tensor, embeddings: Tensor) -> Tensor:
    """Return the class `[N]` whose mean of unit embeddings `fit` is nearest by cosine."""
    unit = nn.functional.normalize(fit)
    means = torch.stack([unit[labels == label].mean(0) for label in range(int(labels.max()) + 1)])
    return (nn.functional.normalize(embeddings) @ nn.functional.normalize(means).T).argmax(1)


def by_neighbour(fit: Tensor, labels: Tensor, embeddings: Tensor) -> Tensor:
    """Return the class `[N]` of the nearest of the embeddings `fit`, by cosine."""
    return labels[(nn.functional.normalize(embeddings) @ nn.functional.normalize(fit).T).argmax(1)]


def percent(same: Tensor) -> float:
    """Return the share of True, in percent."""
    return round(100 * same.float().mean().item(), 2)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Return the squared distance over the squared length."""
    return ((got - wanted).square().sum() / wanted.square().sum()).item()
