"""Load the bundled Fashion-MNIST test images and the small reference vision transformer trained on Fashion-MNIST."""

from __future__ import annotations

import gzip
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

__all__ = ["CLASSES", "MEAN", "STD", "fashion_mnist", "reference_model"]

CLASSES: tuple[str, ...] = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
# pixel mean and standard deviation of the 60,000 training images on the scale 0..1
MEAN: float = 0.2860
STD: float = 0.3530

_ASSETS = Path(__file__).parent
# where Debian's package dataset-fashion-mnist puts its files
_DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
_PREFIX_AND_COUNT = {"train": ("train", 60_000), "test": ("t10k", 10_000)}


def _read_idx(path: Path, shape: tuple[int, ...]) -> Tensor:
    """Read a gzipped idx file of unsigned bytes; it must have exactly this shape."""
    data = bytearray(gzip.decompress(path.read_bytes()))
    # 0x08 is the format's code for unsigned bytes; the last byte of the magic number counts the dimensions
    magic = bytes((0, 0, 8, len(shape)))
    if bytes(data[:4]) != magic:
        raise ValueError(f"{path}: magic number {bytes(data[:4]).hex()} where {magic.hex()} was expected")
    header = 4 + 4 * len(shape)
    found = tuple(int.from_bytes(data[start : start + 4], "big") for start in range(4, header, 4))
    if found != shape:
        raise ValueError(f"{path}: the header says shape {found} where {shape} was expected")
    values = torch.frombuffer(data, dtype=torch.uint8)[header:].clone()
    expected = torch.Size(shape).numel()
    if values.numel() != expected:
        raise ValueError(f"{path}: {values.numel()} bytes of data where {expected} were expected")
    return values.view(shape)


def fashion_mnist(split: str = "test", root: str | Path | None = None) -> tuple[Tensor, Tensor]:
    """Return the images, uint8 `[N, 28, 28]`, and labels, int64 `[N]`, of a Fashion-MNIST split.

    The test split (N = 10,000) is bundled. The training split (N = 60,000) is read from `root`, or from the folder of
    Debian's package `dataset-fashion-mnist` if that is installed. If `root` is given, both splits are read from it; it
    must hold the four original `*-ubyte.gz` files.

    Raises:
        ValueError: `split` is neither "train" nor "test", or a file is not a valid idx file of the split.
        FileNotFoundError: a file of the split is missing from the folder.
    """
    if split not in _PREFIX_AND_COUNT:
        raise ValueError(f'split must be "train" or "test", not {split!r}')
    prefix, count = _PREFIX_AND_COUNT[split]
    default = _ASSETS / "fashion_mnist" if split == "test" else _DEBIAN_FOLDER
    folder = default if root is None else Path(root)
    images_path = folder / f"{prefix}-images-idx3-ubyte.gz"
    labels_path = folder / f"{prefix}-labels-idx1-ubyte.gz"
    for path in (images_path, labels_path):
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} not found: install Debian's package dataset-fashion-mnist, or pass root= with a folder that "
                "holds the four *-ubyte.gz files of https://github.com/zalandoresearch/fashion-mnist"
            )
    images = _read_idx(images_path, (count, 28, 28))
    labels = _read_idx(labels_path, (count,)).long()
    if int(labels.max()) >= len(CLASSES):
        raise ValueError(f"{labels_path}: label {int(labels.max())} where 0 to {len(CLASSES) - 1} were expected")
    return images, labels


def _build_model(architecture: dict[str, Any], patch_drop_rate: float = 0.0) -> VisionTransformer:
    """Build the untrained model from its two groups of keyword arguments, "vit" and "stem"."""
    try:
        from timm.layers import HybridEmbed
        from timm.models.vision_transformer import VisionTransformer
        from timm.models.vision_transformer_hybrid import ConvStem
    except ImportError as error:
        raise ImportError('the reference model is built by timm: pip install "tokenmerge[timm]"') from error
    # the stem's last 1x1 convolution already maps to the width, so the embedding needs no projection of its own
    embed = partial(HybridEmbed, ConvStem(**architecture["stem"]), proj=False)
    return VisionTransformer(embed_layer=embed, patch_drop_rate=patch_drop_rate, **architecture["vit"])


def reference_model(pretrained: bool = True) -> VisionTransformer:
    """Return the reference transformer, an ordinary timm `VisionTransformer`, in eval mode on the CPU in fp32.

    It takes float `[B, 1, 28, 28]`, pixels scaled to 0..1 and then normalised by `MEAN` and `STD`, and returns logits
    `[B, 10]` in the order of `CLASSES`. Its architecture is read from `reference_vit.json`, its weights from
    `reference_vit.safetensors`, both beside this file; `pretrained=False` leaves it randomly initialised.

    Raises:
        ImportError: timm is not installed.
        FileNotFoundError: a file named above is missing.
    """
    model = _build_model(json.loads((_ASSETS / "reference_vit.json").read_text(encoding="utf-8")))
    if pretrained:
        from safetensors.torch import load_file

        # weights stored in half precision are widened here: copying into the model's own parameters casts them
        model.load_state_dict(load_file(_ASSETS / "reference_vit.safetensors"))
    # where timm models declare their preprocessing
    model.pretrained_cfg = {
        "input_size": (1, 28, 28),
        "mean": (MEAN,),
        "std": (STD,),
        "crop_pct": 1.0,
        "label_names": CLASSES,
    }
    return model.eval()
