"""timm's EVA class with absolute and rotary positions: EVA, EVA-02, DINOv3, Perception Encoder, RoPE-ViT and its kin.

Shapes: B batch, N tokens, M tokens left, C channels, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokenmerge._intercept.follow import rows
from tokenmerge._intercept.override import Override
from tokenmerge._intercept.pooling import BiasedPool, InputMean, PoolGuard
from tokenmerge._intercept.projections import listen_with_biases
from tokenmerge._intercept.taps import AttentionTap, SeamTap
from tokenmerge.adapters.base import PROBED, Adapter, Binding, BlockSpec, Follow, Sizes, TokenLayout, class_names
from tokenmerge.adapters.timm.vit import TimmViT, timm_blocks, timm_tokens
from tokenmerge.errors import UnsupportedModelError

__all__ = ["EVA_SPECS", "RopeTap", "TimmEva", "moved_by_tap", "placed_by_rope", "sample_rope"]

EVA_SPECS = {
    "timm.models.eva.EvaBlock": BlockSpec(
        attention=("norm1", "attn", "gamma_1", "drop_path1"), attn="attn", mlp=("norm2", "mlp", "gamma_2", "drop_path2")
    ),
    "timm.models.eva.EvaBlockPostNorm": BlockSpec(
        attention=("attn", "norm1", "drop_path1"), attn="attn", mlp=("mlp", "norm2", "drop_path2")
    ),
}


def moved_by_tap(value: Any, kept: Tensor) -> Any:
    """Leave a rotary table as it is: it has no rows for prefix tokens, and only the attention says how many there are.

    `RopeTap` takes its rows.
    """
    return value


class RopeTap(SeamTap):
    """Turns timm's attentions with rotary tables: each token that is left by the row of the place it stands at.

    Keys are listened to before they are turned: tokens are compared by what they show, not by where they are.
    """

    def __init__(self, block: nn.Module, path: str) -> None:
        super().__init__(block, path)
        attn = self.attn
        self.is_by_head = _is_by_head()
        if not getattr(attn, "fused_attn", True) and "maybe_add_mask" not in type(attn).forward.__globals__:
            self.takes_bias = False  # before timm 1.0.20 an unfused EvaAttention reads masks as true and false

    def __call__(self, x: Tensor, bias: Tensor | None, kept: Tensor | None = None, **given: Any) -> Tensor:
        if kept is not None and "rope" in given:
            given["rope"] = self.turned(given["rope"], kept)
        return super().__call__(x, bias, kept, **given)

    def turned(self, table: Tensor, kept: Tensor) -> Tensor:
        """Return the table's rows for the tokens behind the prefix, `[B, 1 or H, M, 2D]`."""
        return _turned(self.attn, table, kept, self.is_by_head)

    def seams(self, needs: frozenset[str]) -> list[Binding]:
        attn: Any = self.attn
        found = super().seams(needs)
        if "v" not in needs or getattr(attn, "q_bias", None) is None:
            return found
        return listen_with_biases(self, found, frozenset({"v"}))


def _is_by_head() -> bool:
    """Say what three dimensions of a table mean: timm 1.0.16 has tables per image, later ones per head."""
    from timm import layers

    return hasattr(layers, "RotaryEmbeddingMixed")


def _turned(attn: Any, table: Tensor, kept: Tensor, is_by_head: bool) -> Tensor:
    """Return the rows of a table `[N, 2D]`, `[H, N, 2D]` or `[B, 1 or H, N, 2D]` at `kept` `[B, M]`, for the tokens
    behind the prefix: `[B, 1 or H, M, 2D]`.
    """
    prefix: int = attn.num_prefix_tokens
    table = table[None] if table.dim() == 3 and is_by_head else table
    turned = rows(table, kept[:, prefix:] - prefix)
    return turned if turned.dim() == 4 else turned[:, None]


def placed_by_rope(attn: nn.Module, places: Tensor) -> list[Binding]:
    """Return what makes an unpatched attention turn token n as one that stands at `places` `[B, N]`."""
    return [Binding(attn, "forward", _Placed(attn, places))]


class _Placed(Override):
    def __init__(self, attn: nn.Module, places: Tensor) -> None:
        super().__init__(attn)
        self.is_by_head, self.places = _is_by_head(), places

    def __call__(self, x: Tensor, rope: Tensor | None = None, **given: Any) -> Any:
        moved = None if rope is None else _turned(self.owner, rope, self.places, self.is_by_head)
        return self.original(x, rope=moved, **given)


def sample_rope(attn: Any, n: int) -> Tensor:
    """Return a rotary table `[n, 2D]` to probe an attention with: any numbers, but not random ones."""
    weight: Tensor = attn.proj.weight
    width = 2 * attn.proj.in_features // attn.num_heads
    return torch.arange(n * width, device=weight.device).view(n, width).sin().to(weight.dtype)


class TimmEva(Adapter):
    name = "timm_eva"
    families = "timm EVA, EVA-02, DINOv3, Perception Encoder, RoPE-ViT, LingBot-Vision, Sapiens2"
    landmarks = ("blocks", "norm1", "attn", "norm2", "mlp", "patch_embed", "rope", "fc_norm")
    cut_by = "patch_embed"
    followers: ClassVar[Mapping[str, Follow]] = {"rope": moved_by_tap}
    is_positional = True
    token_methods = ("forward_features", "forward_intermediates")
    package = "timm"
    loops, heads = TimmViT.loops, TimmViT.heads

    def matches(self, model: Any) -> bool:
        return "timm.models.eva.Eva" in class_names(model)

    def blocks(self, model: Any) -> list[tuple[str, nn.Module]]:
        return timm_blocks(model)

    def spec(self, block: Any) -> BlockSpec:
        spec = next((EVA_SPECS[name] for name in class_names(block) if name in EVA_SPECS), None)
        if spec is None:
            raise UnsupportedModelError(
                f"blocks of class {class_names(block)[0]} are not described: an Eva of timm has "
                f"{' or '.join(name.rpartition('.')[2] for name in EVA_SPECS)}."
            )
        return spec

    def layout(self, model: Any) -> TokenLayout:
        embed, prefix = model.patch_embed, int(model.num_prefix_tokens)
        has_class = model.cls_token is not None
        if not all(hasattr(embed, name) for name in ("grid_size", "proj", "img_size")):  # a stem of the user's own
            return TokenLayout(prefix, None, None, None, has_class=has_class)
        height, width = embed.grid_size
        channels = embed.proj.in_channels
        return TokenLayout(
            prefix, (height, width), prefix + height * width, (channels, *embed.img_size), has_class=has_class
        )

    def tap(self, block: Any) -> AttentionTap:
        return RopeTap(block, "attn")

    def sample(self, model: Any, block: Any, layout: TokenLayout) -> tuple[int, dict[str, Any]]:
        return layout.prefix + PROBED, {} if model.rope is None else {"rope": sample_rope(block.attn, PROBED)}

    def placed(self, block: Any, places: Tensor) -> list[Binding]:
        return placed_by_rope(block.attn, places)

    def head(self, model: Any, sizes: Sizes) -> tuple[list[Binding], list[str]]:
        # both: an attention pool may be taken out later
        found = [Binding(model, "pool", InputMean(model, sizes))]
        if isinstance(model.attn_pool, nn.Module):
            # it attends to prefix tokens too
            found.append(Binding(model.attn_pool, "forward", BiasedPool(model.attn_pool, sizes, start=0)))
        return found, []

    def guards(self, model: Any, is_merging: Callable[[], bool]) -> list[Binding]:
        return [Binding(model, "pool", PoolGuard(model, "pool", is_merging))]

    def hands_out(self, model: Any) -> str | None:
        return timm_tokens(model)

    def tiny(self) -> tuple[nn.Module, Tensor]:
        from timm.models.eva import Eva

        model = Eva(
            img_size=32,
            patch_size=8,
            embed_dim=32,
            depth=4,
            num_heads=4,
            num_classes=10,
            init_values=0.5,
            swiglu_mlp=True,
            use_rot_pos_emb=True,
        )
        return model.eval(), torch.randn(2, 3, 32, 32)
