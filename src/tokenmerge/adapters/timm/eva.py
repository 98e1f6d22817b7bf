"""timm's EVA class, absolute and rotary positions: EVA, EVA-02, DINOv3, Perception Encoder, RoPE-ViT and others.

Shapes: B batch, N tokens, M tokens left, C channels, H heads, D head width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokenmerge._intercept.follow import rows
from tokenmerge._intercept.override import Override
from tokenmerge._intercept.pooling import InputMean
from tokenmerge._intercept.projections import listen_with_biases
from tokenmerge._intercept.taps import AttentionTap, SeamTap
from tokenmerge.adapters.base import PROBED, Binding, BlockSpec, Context, TokenLayout
from tokenmerge.adapters.timm.base import TIMM, TimmAdapter, pooling, stem_layout
from tokenmerge.adapters.timm.vit import TimmViT

__all__ = ["EVA_SPECS", "RopeTap", "TimmEva", "moved_by_tap", "sample_rope"]

EVA_SPECS = {
    "timm.models.eva.EvaBlock": BlockSpec(
        attention=("norm1", "attn", "gamma_1", "drop_path1"), attn="attn", mlp=("norm2", "mlp", "gamma_2", "drop_path2")
    ),
    "timm.models.eva.EvaBlockPostNorm": BlockSpec(
        attention=("attn", "norm1", "drop_path1"), attn="attn", mlp=("mlp", "norm2", "drop_path2")
    ),
}


def moved_by_tap(value: Any, kept: Tensor) -> Any:
    """Return a rotary table unchanged; `RopeTap` gathers its rows.

    The table has no rows for prefix tokens, and only the attention knows how many prefix tokens there are.
    """
    return value


class RopeTap(SeamTap):
    """Feeds timm's rotary attention the table rows of the remaining tokens.

    Keys are captured before the rotation, so that tokens are compared by content and not by position.
    """

    def __init__(self, block: nn.Module, path: str) -> None:
        super().__init__(block, path)
        attn = self.attn
        self.is_by_head = _is_by_head()
        if not getattr(attn, "fused_attn", True) and "maybe_add_mask" not in type(attn).forward.__globals__:
            self.takes_bias = False  # before timm 1.0.20 an unfused EvaAttention treats masks as bool

    def __call__(self, x: Tensor, bias: Tensor | None, kept: Tensor | None = None, **given: Any) -> Tensor:
        if kept is not None and "rope" in given:
            given["rope"] = self.turned(given["rope"], kept)
        return super().__call__(x, bias, kept, **given)

    def turned(self, table: Tensor, kept: Tensor) -> Tensor:
        """Return the table's rows for the tokens after the prefix, `[B, 1 or H, M, 2D]`."""
        return _turned(self.attn, table, kept, self.is_by_head)

    def placed(self, places: Tensor) -> list[Binding]:
        return [Binding(self.attn, "forward", _Placed(self.attn, places))]

    def seams(self, needs: frozenset[str]) -> list[Binding]:
        attn: Any = self.attn
        found = super().seams(needs)
        if "v" not in needs or getattr(attn, "q_bias", None) is None:
            return found
        return listen_with_biases(self, found, frozenset({"v"}))


def _is_by_head() -> bool:
    """Return whether the first axis of a three-dimensional table is heads; in timm 1.0.16 it is images."""
    from timm import layers

    return hasattr(layers, "RotaryEmbeddingMixed")


def _turned(attn: Any, table: Tensor, kept: Tensor, is_by_head: bool) -> Tensor:
    """Return the rows of a rotary table at `kept` `[B, M]`, for the tokens after the prefix: `[B, 1 or H, M, 2D]`.

    The table is `[N, 2D]`, `[H, N, 2D]` or `[B, 1 or H, N, 2D]`.
    """
    prefix: int = attn.num_prefix_tokens
    table = table[None] if table.dim() == 3 and is_by_head else table
    turned = rows(table, kept[:, prefix:] - prefix)
    return turned if turned.dim() == 4 else turned[:, None]


class _Placed(Override):
    def __init__(self, attn: nn.Module, places: Tensor) -> None:
        super().__init__(attn)
        self.is_by_head, self.places = _is_by_head(), places

    def __call__(self, x: Tensor, rope: Tensor | None = None, **given: Any) -> Any:
        moved = None if rope is None else _turned(self.owner, rope, self.places, self.is_by_head)
        return self.original(x, rope=moved, **given)


def sample_rope(attn: Any, n: int) -> Tensor:
    """Return a rotary table `[n, 2D]` for probing an attention; its values are arbitrary but not random."""
    weight: Tensor = attn.proj.weight
    width = 2 * attn.proj.in_features // attn.num_heads
    return torch.arange(n * width, device=weight.device).view(n, width).sin().to(weight.dtype)


class TimmEva(TimmAdapter):
    name = "timm_eva"
    families = "timm EVA, EVA-02, DINOv3, Perception Encoder, RoPE-ViT, LingBot-Vision, Sapiens2"
    landmarks = ("blocks", "norm1", "attn", "norm2", "mlp", "patch_embed", "rope", "fc_norm")
    sizes: ClassVar = {"init_values": 0.5, "swiglu_mlp": True, "use_rot_pos_emb": True}
    host = replace(
        TIMM,
        models=("timm.models.eva.Eva",),
        followers={"rope": moved_by_tap},
        is_positional=True,
        heads=TimmViT.host.heads,
    )
    specs = EVA_SPECS

    def layout(self, model: Any) -> TokenLayout:
        return stem_layout(model.patch_embed, int(model.num_prefix_tokens), model.cls_token is not None)

    def tap(self, block: Any) -> AttentionTap:
        return RopeTap(block, "attn")

    def sample(self, model: Any, block: Any, layout: TokenLayout) -> tuple[int, dict[str, Any]]:
        return layout.prefix + PROBED, {} if model.rope is None else {"rope": sample_rope(block.attn, PROBED)}

    def overrides(self, model: Any, context: Context) -> list[Binding]:
        return pooling(model, context, InputMean)
