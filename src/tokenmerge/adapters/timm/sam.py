"""timm's Segment Anything encoder: windowed attention, relative positions, a convolutional neck.

Shapes: W windows, N tokens of a window, M tokens left of it, C channels, H heads, D head width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenmerge._intercept.taps import AttentionTap
from tokenmerge.adapters.base import Adapter, Binding, Host, TokenLayout, WindowSpec, class_names
from tokenmerge.adapters.timm.base import stem_layout
from tokenmerge.errors import UnsupportedModelError

__all__ = ["TimmSAM"]

_HOST = "timm.models.vision_transformer_sam"


class SAMTap(AttentionTap):
    """Computes SAM's attention from its children, for tokens at arbitrary places of their window."""

    kind = "its own projection, in each window"

    def project(self, x: Tensor) -> Tensor:  # [W, N, C]
        """Return queries, keys and values as one row per token, `[W, N, 3 * C]`, so that rows can be merged."""
        qkv: Tensor = self.attn.qkv(x)
        return qkv

    def split(self, qkv: Tensor, names: frozenset[str] = frozenset("qkv")) -> dict[str, Tensor]:
        """Return the named ones of q, k and v, normalised, each `[W, H, N, D]`."""
        W, N, _ = qkv.shape
        parts = dict(zip("qkv", qkv.view(W, N, 3, self.attn.num_heads, -1).permute(2, 0, 3, 1, 4), strict=True))
        norms = {"q": self.attn.q_norm, "k": self.attn.k_norm}
        return {name: norms[name](parts[name]) if name in norms else parts[name] for name in sorted(names)}

    def __call__(self, x: Tensor, bias: Tensor | None, kept: Tensor | None = None, **given: Any) -> Tensor:
        """Attend over projected tokens `[W, M, 3 * C]` at places `kept` of the window's `grid`; returns `[W, M, C]`."""
        attn, (W, M, _) = self.attn, x.shape
        seen = self.split(x)
        q, k, v = seen["q"], seen["k"], seen["v"]
        kept = torch.arange(M, device=x.device).expand(W, -1) if kept is None else kept
        mask = None if bias is None else bias.to(q.dtype)[:, None, None, :]
        if attn.use_rel_pos:
            relative = self._relative(q, kept, given["grid"])
            mask = relative if mask is None else relative + mask
        elif attn.rope is not None:
            q, k = self._turned(q, kept).type_as(v), self._turned(k, kept).type_as(v)
        dropout = attn.attn_drop.p if attn.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        projected: Tensor = attn.proj_drop(attn.proj(out.transpose(1, 2).reshape(W, M, -1)))
        return projected

    def _relative(self, q: Tensor, kept: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return the bias of each query by the row and column distances of the tokens, `[W, H, M, M]`."""
        from timm.models.vision_transformer_sam import get_rel_pos

        parts = []
        for place, side, table in zip((kept // grid[1], kept % grid[1]), grid, _tables(self.attn), strict=True):
            by_line = torch.einsum("whmd,wmsd->whms", q, get_rel_pos(side, side, table)[place])  # [W, H, M, side]
            parts.append(by_line.gather(3, place[:, None, None, :].expand(*q.shape[:3], -1)))
        return parts[0] + parts[1]

    def _turned(self, x: Tensor, kept: Tensor) -> Tensor:  # [W, H, M, D]
        from timm.layers import apply_rot_embed_cat

        turned: Tensor = apply_rot_embed_cat(x, self.attn.rope.get_embed()[kept][:, None])
        return turned

    def seams(self, needs: frozenset[str]) -> list[Binding]:
        return []


def _tables(attn: Any) -> tuple[Tensor, Tensor]:
    return attn.rel_pos_h, attn.rel_pos_w


class TimmSAM(Adapter):
    name = "timm_sam"
    families = "timm's Segment Anything encoders (samvit), merged inside windows for the attention only"
    landmarks = ("patch_embed", "blocks", "norm1", "attn", "norm2", "mlp", "neck")
    # no method needs trust: every block returns all tokens
    host = Host("timm", models=(f"{_HOST}.VisionTransformerSAM",), loops=(), is_positional=True)

    def spec(self, block: Any) -> WindowSpec:
        attn: Any = getattr(block, "attn", None)
        if f"{_HOST}.Block" not in class_names(block) or f"{_HOST}.Attention" not in class_names(attn):
            raise UnsupportedModelError(
                f"blocks of class {class_names(block)[0]} with an attention of class {class_names(attn)[0]} are not "
                f"described, only {_HOST}'s Block and Attention are: it is not known how windows are cut."
            )
        return WindowSpec(attn="attn", window="window_size")

    def layout(self, model: Any) -> TokenLayout:
        # the number of tokens is that of a window, which differs between blocks
        return replace(stem_layout(model.patch_embed), tokens=None)

    def tap(self, block: Any) -> AttentionTap:
        return SAMTap(block, "attn")

    def sample(self, model: Any, block: Any, layout: TokenLayout) -> tuple[int, dict[str, Any]]:
        side = block.window_size
        # a rotary table only fits the grid it was made for
        whole = (3, 4) if block.attn.rope is None else model.patch_embed.grid_size
        grid = (side + 1, side) if side else whole  # a grid that needs padding to whole windows
        return grid[0] * grid[1], {"grid": grid}

    def tiny(self) -> tuple[nn.Module, Tensor]:
        from timm.models.vision_transformer_sam import VisionTransformerSAM

        model = VisionTransformerSAM(
            img_size=32,
            patch_size=4,
            embed_dim=32,
            depth=4,
            num_heads=4,
            num_classes=10,
            use_rel_pos=True,
            window_size=3,
            global_attn_indexes=(1, 3),
            neck_chans=16,
        )
        return model.eval(), torch.randn(2, 3, 32, 32)
