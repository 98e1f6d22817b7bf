"""A small model with the structure of spatiotemporal MAE's own repository.

Shapes: B batch, N tokens, C channels, T frames.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["VideoMAEStandIn"]


class VideoMAEStandIn(nn.Module):
    """Patches over several frames, separate positions for space and time, a class token; classifies the mean patch."""

    def __init__(
        self,
        *,
        frames: int = 8,
        image_size: int = 32,
        patch: tuple[int, int, int] = (2, 16, 16),
        width: int = 32,
        depth: int = 4,
        heads: int = 4,
        num_classes: int = 10,
        sep_pos_embed: bool = True,
        cls_embed: bool = True,
    ) -> None:
        super().__init__()
        self.patch_embed = _Patches((frames, image_size, image_size), patch, width)
        times, rows, columns = self.patch_embed.input_size
        self.sep_pos_embed, self.cls_embed = sep_pos_embed, cls_embed
        if cls_embed:
            self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        if sep_pos_embed:
            self.pos_embed_spatial = nn.Parameter(torch.randn(1, rows * columns, width) * 0.02)
            self.pos_embed_temporal = nn.Parameter(torch.randn(1, times, width) * 0.02)
            if cls_embed:
                self.pos_embed_class = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        else:
            self.pos_embed = nn.Parameter(torch.randn(1, times * rows * columns + cls_embed, width) * 0.02)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.dropout = nn.Dropout(0.0)
        self.head = nn.Linear(width, num_classes)

    def _positions(self) -> Tensor:  # [1, N, C]
        if not self.sep_pos_embed:
            return self.pos_embed
        # [1, T, 1, C] and [1, 1, places, C]
        patches = (self.pos_embed_temporal[:, :, None] + self.pos_embed_spatial[:, None]).flatten(1, 2)
        return torch.cat((self.pos_embed_class, patches), dim=1) if self.cls_embed else patches

    def forward(self, x: Tensor) -> Tensor:  # [B, 3, T, height, width] -> [B, classes]
        x = self.patch_embed(x)
        if self.cls_embed:
            x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        x = x + self._positions()
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.dropout(self.norm(x[:, int(self.cls_embed) :].mean(dim=1))))
        return logits


class _Patches(nn.Module):
    def __init__(self, size: tuple[int, int, int], patch: tuple[int, int, int], width: int) -> None:
        super().__init__()
        self.input_size = (size[0] // patch[0], size[1] // patch[1], size[2] // patch[2])
        self.proj = nn.Conv3d(3, width, patch, patch)

    def forward(self, x: Tensor) -> Tensor:  # [B, 3, T, height, width] -> [B, N, C]
        return self.proj(x).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = _Attention(width, heads)
        self.drop_path = nn.Identity()
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:  # [B, N, C]
        x = x + self.drop_path(self.attn(self.norm1(x)))
        out: Tensor = x + self.drop_path(self.mlp(self.norm2(x)))
        return out


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.scale = heads, (width // heads) ** -0.5
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:  # [B, N, C]
        q, k, v = (
            project(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for project in (self.q, self.k, self.v)
        )
        weights = (q @ k.mT * self.scale).softmax(dim=-1)
        out: Tensor = self.proj_drop(self.proj((weights @ v).transpose(1, 2).flatten(2)))
        return out
