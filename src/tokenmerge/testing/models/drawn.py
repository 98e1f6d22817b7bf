"""Random parameters that expose mistakes, and the small model of most tests."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

__all__ = ["randomised", "tiny_vit"]

Model = TypeVar("Model", bound=nn.Module)


def randomised(model: Model) -> Model:
    """Draw all parameters at random: norms, biases, layer scale, and weights that mix tokens.

    A fresh model hides mistakes: its norms and layer scales are 1, its biases 0, and its attention is flat.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                parameter.normal_(0.5, 0.5)
            elif "pos_embed" in name or "token" in name or "latent" in name:
                parameter.normal_()
            else:
                # twice the usual deviation: with attention that is not flat, each token matters
                parameter.normal_(0.0, 2 * parameter[0].numel() ** -0.5)
    return model


def tiny_vit(**options: Any) -> nn.Module:
    """Return a small timm VisionTransformer with randomised parameters, in eval mode: 64 patches of 32 x 32 pixels."""
    from timm.models.vision_transformer import VisionTransformer

    settings = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 4, "num_classes": 10}
    model: nn.Module = VisionTransformer(**{**settings, **options})
    return randomised(model).eval()
