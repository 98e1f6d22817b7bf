"""Small models with the structure of DINO's and DINOv2's own repositories.

Shapes: B batch, N tokens, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["DinoStandIn", "DinoV2StandIn"]


class _Patches(nn.Module):
    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_size, patch_size)

    def forward(self, x: Tensor) -> Tensor:  # [B, 3, height, width] -> [B, N, C]
        return self.proj(x).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]


class _Attention(nn.Module):
    """Returns its weights too if `has_weights`."""

    def __init__(self, width: int, heads: int, has_weights: bool) -> None:
        super().__init__()
        self.num_heads, self.scale, self.has_weights = heads, (width // heads) ** -0.5, has_weights
        self.qkv = nn.Linear(width, 3 * width)
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Any:  # [B, N, C]
        B, N, C = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        weights = self.attn_drop((q @ k.mT * self.scale).softmax(dim=-1))
        out = self.proj_drop(self.proj((weights @ v).transpose(1, 2).reshape(B, N, C)))
        return (out, weights) if self.has_weights else out


def _mlp(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


class DinoStandIn(nn.Module):
    """The structure of DINO's model: forward returns the class token; other methods return tokens and attention."""

    def __init__(
        self, *, image_size: int = 32, patch_size: int = 8, width: int = 32, depth: int = 4, heads: int = 4
    ) -> None:
        super().__init__()
        self.patch_embed = _Patches(patch_size, width)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, (image_size // patch_size) ** 2 + 1, width) * 0.02)
        self.pos_drop = nn.Dropout(0.0)
        self.blocks = nn.ModuleList(_DinoBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Identity()

    def prepare_tokens(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed
        out: Tensor = self.pos_drop(x)
        return out

    def forward(self, x: Tensor) -> Tensor:  # [B, 3, height, width] -> [B, C]
        return self.get_intermediate_layers(x)[-1][:, 0]

    def get_last_selfattention(self, x: Tensor) -> Tensor:  # [B, H, N, N]
        x = self.prepare_tokens(x)
        for block in self.blocks[:-1]:
            x = block(x)
        weights: Tensor = self.blocks[-1](x, return_attention=True)
        return weights

    def get_intermediate_layers(self, x: Tensor, n: int = 1) -> list[Tensor]:
        x = self.prepare_tokens(x)
        found = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if len(self.blocks) - i <= n:
                found.append(self.norm(x))
        return found


class _DinoBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = _Attention(width, heads, has_weights=True)
        self.drop_path = nn.Identity()
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = _mlp(width)

    def forward(self, x: Tensor, return_attention: bool = False) -> Tensor:
        branch, weights = self.attn(self.norm1(x))
        if return_attention:
            return weights  # type: ignore[no-any-return]
        x = x + self.drop_path(branch)
        out: Tensor = x + self.drop_path(self.mlp(self.norm2(x)))
        return out


class DinoV2StandIn(nn.Module):
    """The structure of DINOv2's model: registers, layer scale, blocks in a list or `chunks`, tokens in a dictionary."""

    def __init__(
        self,
        *,
        image_size: int = 32,
        patch_size: int = 8,
        width: int = 32,
        depth: int = 4,
        heads: int = 4,
        registers: int = 2,
        chunks: int = 0,
    ) -> None:
        super().__init__()
        self.patch_size, self.num_register_tokens = patch_size, registers
        self.patch_embed = _Patches(patch_size, width)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, (image_size // patch_size) ** 2 + 1, width) * 0.02)
        self.register_tokens = nn.Parameter(torch.randn(1, registers, width) * 0.02) if registers else None
        blocks: list[nn.Module] = [_DinoV2Block(width, heads) for _ in range(depth)]
        self.chunked_blocks = chunks > 0
        if chunks:
            # placeholders give each block the same index in its chunk as in the model
            size = depth // chunks
            parts = [[nn.Identity()] * i + blocks[i : i + size] for i in range(0, depth, size)]
            blocks = [_Chunk(part) for part in parts]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Identity()

    def prepare_tokens_with_masks(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        x = self.patch_embed(x)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed
        if self.register_tokens is not None:
            x = torch.cat((x[:, :1], self.register_tokens.expand(x.shape[0], -1, -1), x[:, 1:]), dim=1)
        return x

    def forward_features_list(self, x: list[Tensor], masks: Any = None) -> list[dict[str, Tensor]]:
        return [self._split(tokens) for tokens in self._run([self.prepare_tokens_with_masks(each) for each in x])]

    def forward_features(self, x: Any, masks: Tensor | None = None) -> Any:
        if isinstance(x, list):
            return self.forward_features_list(x, masks)
        return self._split(self._run(self.prepare_tokens_with_masks(x, masks)))

    def _run(self, x: Any) -> Any:
        for block in self.blocks:
            x = block(x)
        return x

    def _split(self, x: Tensor) -> dict[str, Tensor]:
        normed, prefix = self.norm(x), 1 + self.num_register_tokens
        return {
            "x_norm_clstoken": normed[:, 0],
            "x_norm_regtokens": normed[:, 1:prefix],
            "x_norm_patchtokens": normed[:, prefix:],
            "x_prenorm": x,
        }

    def get_intermediate_layers(self, x: Tensor, n: int = 1, reshape: bool = False) -> tuple[Tensor, ...]:
        height, width = (size // self.patch_size for size in x.shape[2:])
        x = self.prepare_tokens_with_masks(x)
        found = []
        for block in _flat(self.blocks):
            x = block(x)
            found.append(self.norm(x)[:, 1 + self.num_register_tokens :])
        taken = found[-n:]
        return tuple(tokens.mT.unflatten(-1, (height, width)) if reshape else tokens for tokens in taken)

    def forward(self, x: Any, masks: Tensor | None = None, is_training: bool = False) -> Any:
        features = self.forward_features(x, masks)
        return features if is_training else self.head(features["x_norm_clstoken"])


def _flat(blocks: nn.ModuleList) -> list[nn.Module]:
    nested = [list(part) if isinstance(part, _Chunk) else [part] for part in blocks]
    return [block for part in nested for block in part if not isinstance(block, nn.Identity)]


class _Chunk(nn.ModuleList):
    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = block(x)
        return x


class _LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class _DinoV2Block(nn.Module):
    """Takes one batch, or a list of batches."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = _Attention(width, heads, has_weights=False)
        self.ls1 = _LayerScale(width)
        self.drop_path1 = nn.Identity()
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = _mlp(width)
        self.ls2 = _LayerScale(width)
        self.drop_path2 = nn.Identity()
        self.sample_drop_ratio = 0.0

    def forward(self, x_or_x_list: Any) -> Any:
        if isinstance(x_or_x_list, list):
            return [self.forward(x) for x in x_or_x_list]
        x = x_or_x_list
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
