"""Small models of the hosts besides timm and transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokenmerge
from helpers import randomised, tiny_vit
from promises import Family, note
from tokenmerge.errors import UnsupportedModelError
from tokenmerge.testing.models.clip import ClipTowerStandIn, NewOpenClipBlockStandIn
from tokenmerge.testing.models.dino import DinoStandIn, DinoV2StandIn

Make = Callable[[], nn.Module]
IMAGES = (2, 3, 32, 32)
VISION = {"layers": 4, "width": 32, "head_width": 8, "patch_size": 4, "image_size": 32, "mlp_ratio": 2.0}
TEXT = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 4, "layers": 2}


def clip(**vision: Any) -> Any:
    """A small CLIP of open_clip; options go to its vision tower."""
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
    return open_clip.CLIP(16, {**VISION, **vision}, TEXT)


def custom_text_clip() -> Any:
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
    return open_clip.CustomTextCLIP(16, VISION, TEXT)


def sequence_first_clip() -> nn.Module:
    model = clip()
    from open_clip.transformer import Transformer

    model.visual.transformer = Transformer(32, 4, 4, 2.0, batch_first=False)
    return model  # type: ignore[no-any-return]


def timm_tower() -> Any:
    """open_clip's wrapper around a timm model that pools by attention, as SigLIP does."""
    model = custom_text_clip()
    from open_clip.timm_model import TimmModel

    model.visual = TimmModel("vit_tiny_patch16_224", embed_dim=16, pool="")
    model.visual.trunk = tiny_vit(num_classes=0, class_token=False, global_pool="map")
    model.visual.head = nn.Linear(32, 16)
    return model


def torchvision_vit(**options: Any) -> Any:
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    settings = {"image_size": 32, "patch_size": 4, "num_layers": 4, "num_heads": 4, "hidden_dim": 32, "mlp_dim": 64}
    return models.VisionTransformer(**{**settings, "num_classes": 10, **options})


def conv_stem() -> nn.Module:
    vit = pytest.importorskip("torchvision.models.vision_transformer", reason="torchvision is not installed")
    return torchvision_vit(conv_stem_configs=[vit.ConvStemConfig(8, 3, 2), vit.ConvStemConfig(16, 3, 2)])  # type: ignore[no-any-return]


def lucidrains(name: str, **options: Any) -> Any:
    vit_pytorch = pytest.importorskip("vit_pytorch", reason="vit-pytorch is not installed")
    settings = {"image_size": 32, "patch_size": 4, "num_classes": 10, "dim": 32, "depth": 4, "heads": 4, "mlp_dim": 64}
    return getattr(vit_pytorch, name)(**{**settings, "dim_head": 6, **options})


def dropping(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.2
    return model


VARIANTS: dict[str, Make] = {
    "torchvision": torchvision_vit,
    "torchvision-representation": lambda: torchvision_vit(representation_size=24),
    "torchvision-conv-stem": conv_stem,
    "torchvision-dropout": lambda: torchvision_vit(dropout=0.2, attention_dropout=0.2),
    "open-clip": clip,
    "open-clip-tower": lambda: clip().visual,
    "open-clip-layerscale": lambda: clip(ls_init_value=0.5, no_ln_pre=True),
    "open-clip-sequence-first": sequence_first_clip,
    "open-clip-avg": lambda: clip(pool_type="avg"),
    "open-clip-avg-ln-after-pool": lambda: clip(pool_type="avg", final_ln_after_pool=True),
    "open-clip-attention-pool": lambda: clip(attentional_pool=True, attn_pooler_queries=5, attn_pooler_heads=4),
    "open-clip-custom-blocks": lambda: clip(qk_norm=True, scale_attn=True, scale_fc=True, scale_heads=True),
    "open-clip-custom-text": custom_text_clip,
    "open-clip-timm-siglip": timm_tower,
    "openai-clip-tower": lambda: ClipTowerStandIn(patch_size=4),
    "open-clip-main-tower": lambda: ClipTowerStandIn(patch_size=4, make_block=NewOpenClipBlockStandIn),
    "dino": lambda: DinoStandIn(patch_size=4),
    "dino-dropout": lambda: dropping(DinoStandIn(patch_size=4)),
    "dinov2": lambda: DinoV2StandIn(patch_size=4, registers=0),
    "dinov2-registers-in-chunks": lambda: DinoV2StandIn(patch_size=4, registers=4, chunks=2),
    "vit-pytorch-vit": lambda: lucidrains("ViT"),
    "vit-pytorch-vit-mean": lambda: lucidrains("ViT", pool="mean"),
    "vit-pytorch-vit-without-classifier": lambda: lucidrains("ViT", num_classes=0),
    "vit-pytorch-vit-dropout": lambda: lucidrains("ViT", dropout=0.2),
    "vit-pytorch-simple-vit": lambda: lucidrains("SimpleViT"),
}
# where a variant stands on the page of what is supported
HEADINGS = {
    "torchvision": "torchvision",
    "open-clip": "open_clip",
    "openai": "CLIP of OpenAI's repository (stand-in)",
    "dino": "DINO and DINOv2 of their own repositories (stand-ins)",
    "vit-pytorch": "vit-pytorch",
}


class LinearProbe(nn.Module):
    """The structure of DINOv2's classifiers: the class token and the mean patch of a backbone."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.linear_head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        features = self.backbone.forward_features(x)
        mean = features["x_norm_patchtokens"].mean(dim=1)
        return self.linear_head(torch.cat((features["x_norm_clstoken"], mean), dim=1))


def built(model: nn.Module) -> Any:
    return randomised(model).eval().double()


def images() -> Tensor:
    return torch.randn(IMAGES).double()


def check_refused(model: Any, match: str, family: Family) -> None:
    with pytest.raises(UnsupportedModelError, match=match) as refusal:
        tokenmerge.patch(model, r=2)
    note(family, "refused", str(refusal.value))
