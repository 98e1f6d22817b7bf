"""Small models with the structure of OpenAI's CLIP, and of the attention in newer versions of open_clip.

Shapes: B batch, N tokens, L words, C channels, H heads, D head width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ClipStandIn", "ClipTowerStandIn", "NewOpenClipBlockStandIn"]

MakeBlock = Callable[[int, int, "Tensor | None"], nn.Module]


class ClipStandIn(nn.Module):
    """The structure of OpenAI's CLIP: two towers of the same blocks; those of the text tower have a causal mask."""

    def __init__(self, *, width: int = 32, depth: int = 4, heads: int = 4, words: int = 6) -> None:
        super().__init__()
        self.visual = ClipTowerStandIn(width=width, depth=depth, heads=heads, output_dim=16)
        mask = torch.full((words, words), float("-inf")).triu(1)
        self.transformer = _Blocks([_ClipBlock(width, heads, mask) for _ in range(2)])
        self.token_embedding = nn.Embedding(20, width)
        self.positional_embedding = nn.Parameter(torch.randn(words, width) * 0.02)
        self.ln_final = _Norm(width)
        self.text_projection = nn.Parameter(torch.randn(width, 16) * width**-0.5)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    @property
    def dtype(self) -> torch.dtype:
        return self.visual.conv1.weight.dtype

    def encode_image(self, image: Tensor) -> Tensor:  # [B, 3, height, width] -> [B, 16]
        features: Tensor = self.visual(image.type(self.dtype))
        return features

    def encode_text(self, text: Tensor) -> Tensor:  # [B, L] -> [B, 16]
        x = self.token_embedding(text).type(self.dtype) + self.positional_embedding.type(self.dtype)
        x = self.transformer(x.permute(1, 0, 2)).permute(1, 0, 2)
        x = self.ln_final(x).type(self.dtype)
        # the end token has the highest id
        features: Tensor = x[torch.arange(x.shape[0]), text.argmax(dim=-1)] @ self.text_projection
        return features

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        images, texts = (F.normalize(x, dim=1) for x in (self.encode_image(image), self.encode_text(text)))
        logits = self.logit_scale.exp() * images @ texts.t()
        return logits, logits.t()


class ClipTowerStandIn(nn.Module):
    """The structure of CLIP's vision tower: tokens as `[N, B, C]` in the blocks; returns the class token's features."""

    def __init__(
        self,
        *,
        image_size: int = 32,
        patch_size: int = 8,
        width: int = 32,
        depth: int = 4,
        heads: int = 4,
        output_dim: int = 10,
        make_block: MakeBlock | None = None,
    ) -> None:
        super().__init__()
        make_block = make_block or _ClipBlock
        self.conv1 = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        tokens = (image_size // patch_size) ** 2 + 1
        self.positional_embedding = nn.Parameter(torch.randn(tokens, width) * width**-0.5)
        self.ln_pre = _Norm(width)
        self.transformer = _Blocks([make_block(width, heads, None) for _ in range(depth)])
        self.ln_post = _Norm(width)
        self.proj = nn.Parameter(torch.randn(width, output_dim) * width**-0.5)
        self.is_batch_first = make_block is not _ClipBlock

    def forward(self, x: Tensor) -> Tensor:  # [B, 3, height, width] -> [B, output_dim]
        x = self.conv1(x).flatten(2).permute(0, 2, 1)
        front = self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)
        x = self.ln_pre(torch.cat((front, x), dim=1) + self.positional_embedding.to(x.dtype))
        x = self.transformer(x) if self.is_batch_first else self.transformer(x.permute(1, 0, 2)).permute(1, 0, 2)
        features: Tensor = self.ln_post(x[:, 0, :]) @ self.proj
        return features


class _Blocks(nn.Module):
    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.resblocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.resblocks(x)
        return out


class _Norm(nn.LayerNorm):
    """LayerNorm that computes in float32 or wider."""

    def forward(self, input: Tensor) -> Tensor:
        wide = torch.promote_types(input.dtype, torch.float32)
        weight, bias = self.weight.to(wide), self.bias.to(wide)
        return F.layer_norm(input.to(wide), self.normalized_shape, weight, bias, self.eps).to(input.dtype)


class _QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


def _mlp(width: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(c_fc=nn.Linear(width, 4 * width), gelu=_QuickGELU(), c_proj=nn.Linear(4 * width, width))
    )


class _ClipBlock(nn.Module):
    def __init__(self, width: int, heads: int, attn_mask: Tensor | None) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1 = _Norm(width)
        self.mlp = _mlp(width)
        self.ln_2 = _Norm(width)
        self.attn_mask = attn_mask

    def attention(self, x: Tensor) -> Tensor:  # [N, B, C]
        mask = None if self.attn_mask is None else self.attn_mask.to(x)
        out: Tensor = self.attn(x, x, x, need_weights=False, attn_mask=mask)[0]
        return out

    def forward(self, x: Tensor) -> Tensor:  # [N, B, C]
        x = x + self.attention(self.ln_1(x))
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class NewOpenClipBlockStandIn(nn.Module):
    """The structure of a block of open_clip after 3.3: a custom batch-first attention that takes a mask."""

    def __init__(self, width: int, heads: int, attn_mask: Tensor | None = None) -> None:
        super().__init__()
        self.ln_1 = _Norm(width)
        self.attn = _MaskedAttention(width, heads)
        self.ls_1 = nn.Identity()
        self.ln_2 = _Norm(width)
        self.mlp = _mlp(width)
        self.ls_2 = nn.Identity()

    def forward(
        self, q_x: Tensor, k_x: Tensor | None = None, v_x: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> Tensor:
        x: Tensor = q_x + self.ls_1(self.attn(self.ln_1(q_x), attn_mask=attn_mask))
        x = x + self.ls_2(self.mlp(self.ln_2(x)))
        return x


class _MaskedAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.in_proj_weight = nn.Parameter(torch.randn(3 * width, width) * width**-0.5)
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.ln_q, self.ln_k = _Norm(width // heads), _Norm(width // heads)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:  # [B, N, C]
        projected = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in projected)  # [B, H, N, D]
        out = F.scaled_dot_product_attention(self.ln_q(q), self.ln_k(k), v, attn_mask=attn_mask)
        joined: Tensor = self.out_proj(out.transpose(1, 2).flatten(2))
        return joined
