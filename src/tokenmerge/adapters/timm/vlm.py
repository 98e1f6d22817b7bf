"""timm's vision towers of Qwen3, Gemma 4 and DeepSeek, and timm's classifiers around them.

Shapes: B batch, N tokens, H heads, D head width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tokenmerge._intercept.follow import keys_of_mask, mask, rows
from tokenmerge._intercept.taps import AttentionTap, SeamTap
from tokenmerge.adapters.base import PROBED, Adapter, BlockSpec, Host, Surroundings, TokenLayout, class_names
from tokenmerge.adapters.timm.base import stem_layout
from tokenmerge.adapters.timm.eva import EVA_SPECS, RopeTap, moved_by_tap, sample_rope

__all__ = ["TimmVLM"]

_MODELS = frozenset(
    f"timm.models.{module}_vit.{family}Vit{part}"
    for module, family in (("qwen3", "Qwen3"), ("gemma4", "Gemma4"), ("deepseek", "Deepseek"))
    for part in ("Encoder", "Classifier")
)
_GEMMA = "timm.models.gemma4_vit.Gemma4Block"
_SPECS = EVA_SPECS | {
    "timm.models.deepseek_vit.DeepseekVitBlock": BlockSpec(
        attention=("norm1", "attn", "drop_path1"), attn="attn", mlp=("norm2", "mlp", "drop_path2")
    ),
    _GEMMA: BlockSpec(
        attention=("norm1", "attn", "norm2", "drop_path"), attn="attn", mlp=("norm3", "mlp", "norm4", "drop_path")
    ),
}


class _GemmaTap(SeamTap):
    """Transposes captured tensors: Gemma's norms get queries, keys and values as `[B, N, H, D]`."""

    def take(self) -> dict[str, Tensor]:
        return {name: seen.transpose(1, 2) for name, seen in super().take().items()}


class TimmVLM(Adapter):
    name = "timm_vlm"
    families = "timm's vision towers of Qwen3, Gemma 4 and DeepSeek, with their projector or as classifiers"
    landmarks = ("blocks", "norm1", "attn", "q_norm", "k_norm", "norm2", "mlp", "patch_embed")
    host = Host(
        "timm",
        models=_MODELS,
        loops=("forward", "forward_features", "encoder.forward", "encoder.forward_features", "encoder._encode"),
        token_methods=("forward_intermediates", "encoder.forward_intermediates"),
        followers={"rope": moved_by_tap, "rope_cos": rows, "rope_sin": rows, "attn_mask": mask},
        padding={"attn_mask": keys_of_mask},
        is_positional=True,
    )
    specs = _SPECS

    def blocks(self, model: Any) -> list[tuple[str, nn.Module]]:
        tower = _tower(model)
        path = "blocks" if tower is model else "encoder.blocks"
        return [(f"{path}.{name}", block) for name, block in tower.blocks.named_children()]

    def layout(self, model: Any) -> TokenLayout:
        # Gemma's patch embedding has no image size
        return stem_layout(_tower(model).patch_embed)

    def tap(self, block: Any) -> AttentionTap:
        return _GemmaTap(block, "attn") if _GEMMA in class_names(block) else RopeTap(block, "attn")

    def surroundings(self, model: Any) -> Surroundings:
        embed: Any = _tower(model).patch_embed
        return replace(
            super().surroundings(model),
            cutter=embed if isinstance(embed, nn.Module) else None,
            last="the tower hands its tokens out as a map, or pools them by their places",
        )

    def sample(self, model: Any, block: Any, layout: TokenLayout) -> tuple[int, dict[str, Any]]:
        if _GEMMA not in class_names(block):
            return PROBED, {"rope": sample_rope(block.attn, PROBED)}
        weight: Tensor = block.norm1.weight
        table = torch.arange(2 * PROBED * block.attn.head_dim, device=weight.device).view(2, PROBED, -1)  # [B, N, D]
        return PROBED, {"rope_cos": table.cos().to(weight.dtype), "rope_sin": table.sin().to(weight.dtype)}

    def tiny(self) -> tuple[nn.Module, Tensor]:
        from timm.models.qwen3_vit import Qwen3VitClassifier

        model = Qwen3VitClassifier(
            img_size=32,
            patch_size=8,
            embed_dim=32,
            depth=4,
            num_heads=4,
            mlp_ratio=2.0,
            num_classes=10,
            encoder_pool="merge",
            out_features=24,
            pos_embed_grid_size=4,
        )
        return model.eval(), torch.randn(2, 3, 32, 32)


def _tower(model: Any) -> Any:
    return getattr(model, "encoder", model)
