"""timm's CaiT: talking-heads attention over the patches, then a class token that attends to all patches.

Shapes: B batch, N queries, M keys, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor, nn

from tokenmerge._intercept.override import ChildOverride
from tokenmerge._intercept.taps import AttentionTap, SeamTap, Slot
from tokenmerge.adapters.base import Binding, BlockSpec, Surroundings, TokenLayout, class_names
from tokenmerge.adapters.timm.base import TIMM, TimmAdapter, stem_layout
from tokenmerge.errors import UnsupportedModelError

__all__ = ["TimmCait"]

_MODULE = "timm.models.cait"
_SPEC = BlockSpec(
    attention=("norm1", "attn", "gamma_1", "drop_path"), attn="attn", mlp=("norm2", "mlp", "gamma_2", "drop_path")
)


class TimmCait(TimmAdapter):
    name = "timm_cait"
    families = "timm CaiT (its patch stage)"
    landmarks = ("blocks", "blocks_token_only", "norm1", "attn", "qkv", "proj_l", "proj_w", "norm2", "mlp")
    sizes: ClassVar = {"init_values": 0.5}
    host = replace(TIMM, models=(f"{_MODULE}.Cait",))

    def spec(self, block: Any) -> BlockSpec:
        kind, attention = class_names(block), class_names(block.attn)
        if f"{_MODULE}.LayerScaleBlock" not in kind or f"{_MODULE}.TalkingHeadAttn" not in attention:
            raise UnsupportedModelError(
                f"a block of class {kind[0]} with {attention[0]} is not described: Cait has LayerScaleBlock with "
                "TalkingHeadAttn."
            )
        return _SPEC

    def layout(self, model: Any) -> TokenLayout:
        return replace(stem_layout(model.patch_embed), has_class=True)  # the class token comes after these blocks

    def tap(self, block: Any) -> AttentionTap:
        return _TalkingTap(block, "attn")

    def surroundings(self, model: Any) -> Surroundings:
        return replace(super().surroundings(model), last="the class token attends to every patch", handed_out=None)


class _TalkingTap(SeamTap):
    """Makes a token of size n count as n tokens in the head mixing before and after the softmax."""

    def __init__(self, block: nn.Module, path: str) -> None:
        super().__init__(block, path)
        self.counts = Slot()
        self.takes_bias = True

    def attend(
        self, run: Callable[..., Any], bias: Tensor | None, kept: Tensor | None, args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        self.counts.put({} if bias is None else {"bias": bias})
        try:
            return run(*args, **kwargs)
        finally:
            self.counts.take()

    def seams(self, needs: frozenset[str]) -> list[Binding]:
        found = super().seams(needs)
        mixes = [_Scores(self.attn, "proj_l", self.counts), _Weights(self.attn, "proj_w", self.counts)]
        self.following += mixes
        return [*found, *(Binding(mix.owner, "forward", mix) for mix in mixes)]


class _Scores(ChildOverride):
    """The head mixing before the softmax, `[B, N, M, H]`: adds log(size) of each key to its output."""

    def __init__(self, attn: nn.Module, child: str, counts: Slot) -> None:
        super().__init__(attn, child)
        self.counts = counts

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = self.original(x)
        bias = self.counts.peek().get("bias")  # [B, M]
        return out if bias is None else self.counted(out, bias.to(out.dtype)[:, None, :, None])

    def counted(self, out: Tensor, bias: Tensor) -> Tensor:
        return out + bias


class _Weights(_Scores):
    """The head mixing after the softmax: multiplies its own bias by the size of each key."""

    def counted(self, out: Tensor, bias: Tensor) -> Tensor:
        own: Tensor | None = self.owner.bias  # type: ignore[assignment]
        return out if own is None else out + bias.expm1() * own
