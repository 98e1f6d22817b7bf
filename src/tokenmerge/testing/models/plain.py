"""Small models with the structure of repositories that cannot be installed, for tests, docs and `doctor`."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

import torch
from torch import Tensor, nn

__all__ = ["MAEStandIn", "PlainStandIn", "SwagStandIn"]


class MAEStandIn(nn.Module):
    """The structure of MAE's fine-tuning model: timm blocks, then `fc_norm` of the mean patch or `norm`."""

    def __init__(
        self,
        *,
        img_size: int = 32,
        patch_size: int = 8,
        embed_dim: int = 32,
        depth: int = 4,
        num_heads: int = 4,
        num_classes: int = 10,
        global_pool: bool = True,
    ) -> None:
        from timm.layers import PatchEmbed
        from timm.models.vision_transformer import Block

        super().__init__()
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.patch_embed = PatchEmbed(img_size, patch_size, 3, embed_dim)
        self.cls_token = nn.Parameter(torch.randn(1, 1, embed_dim) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, self.patch_embed.num_patches + 1, embed_dim) * 0.02)
        self.blocks = nn.Sequential(
            *[Block(embed_dim, num_heads, qkv_bias=True, norm_layer=norm) for _ in range(depth)]
        )
        self.global_pool = global_pool
        if global_pool:
            self.fc_norm = norm(embed_dim)
        else:
            self.norm = norm(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:  # [B, 3, height, width]
        x = self.patch_embed(x)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        features: Tensor = self.fc_norm(x[:, 1:].mean(dim=1)) if self.global_pool else self.norm(x)[:, 0]
        return features

    def forward(self, x: Tensor) -> Tensor:  # [B, 3, height, width] -> [B, classes]
        logits: Tensor = self.head(self.forward_features(x))
        return logits


class SwagStandIn(nn.Module):
    """The structure of SWAG's model: tokens as `[N, B, C]`, class token or mean over tokens (`classifier="gap"`)."""

    def __init__(
        self,
        *,
        image_size: int = 32,
        patch_size: int = 8,
        num_layers: int = 4,
        num_heads: int = 4,
        hidden_dim: int = 32,
        num_classes: int = 10,
        classifier: str = "token",
    ) -> None:
        super().__init__()
        self.conv_proj = nn.Conv2d(3, hidden_dim, patch_size, patch_size)
        tokens = (image_size // patch_size) ** 2
        if classifier == "token":
            self.class_token = nn.Parameter(torch.randn(1, 1, hidden_dim) * 0.02)
            tokens += 1
        self.classifier = classifier
        self.encoder = _SwagEncoder(tokens, num_layers, num_heads, hidden_dim)
        layers = nn.Sequential(OrderedDict(head=nn.Linear(hidden_dim, num_classes)))
        self.head = nn.Sequential(OrderedDict(layers=layers))

    def forward(self, x: Tensor) -> Tensor:  # [B, 3, height, width] -> [B, classes]
        x = self.conv_proj(x).flatten(2).permute(2, 0, 1)  # [N, B, C]
        if self.classifier == "token":
            x = torch.cat((self.class_token.expand(-1, x.shape[1], -1), x), dim=0)
        x = self.encoder(x)
        logits: Tensor = self.head(x[0] if self.classifier == "token" else x.mean(dim=0))
        return logits


class _SwagEncoder(nn.Module):
    def __init__(self, tokens: int, depth: int, heads: int, width: int) -> None:
        super().__init__()
        self.pos_embedding = nn.Parameter(torch.randn(tokens, 1, width) * 0.02)
        blocks: OrderedDict[str, nn.Module] = OrderedDict(
            (f"layer_{i}", _SwagBlock(heads, width)) for i in range(depth)
        )
        self.layers = nn.Sequential(blocks)
        self.ln = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:  # [N, B, C]
        normed: Tensor = self.ln(self.layers(x + self.pos_embedding))
        return normed


class _SwagBlock(nn.Module):
    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps=1e-6)
        self.self_attention = nn.MultiheadAttention(width, heads)
        self.dropout = nn.Dropout(0.0)
        self.ln_2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(
            OrderedDict(linear_1=nn.Linear(width, 4 * width), act=nn.GELU(), linear_2=nn.Linear(4 * width, width))
        )

    def forward(self, x: Tensor) -> Tensor:  # [N, B, C]
        y = self.ln_1(x)
        x = x + self.dropout(self.self_attention(y, y, y, need_weights=False)[0])
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class PlainStandIn(nn.Module):
    """A custom ViT with names of its own, which averages the tokens after the blocks."""

    def __init__(self, *, patch_size: int = 8, width: int = 32, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, patch_size, patch_size)
        self.position = nn.Parameter(torch.randn(1, (32 // patch_size) ** 2, width) * 0.02)
        self.layers = nn.ModuleList(_PlainBlock(width, heads) for _ in range(depth))
        self.classify = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:  # [B, 3, height, width] -> [B, classes]
        x = self.embed(x).flatten(2).mT + self.position
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.classify(x.mean(dim=1))
        return logits


class _PlainBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.before = nn.LayerNorm(width)
        self.mix = nn.MultiheadAttention(width, heads, batch_first=True)
        self.between = nn.LayerNorm(width)
        self.feed = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:  # [B, N, C]
        y = self.before(x)
        x = x + self.mix(y, y, y)[0]
        out: Tensor = x + self.feed(self.between(x))
        return out
