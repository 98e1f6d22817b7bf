"""transformers' wrapper around timm's models: the timm model inside is described by its own adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tokenmerge.adapters.base import Adapter, Replacement, Sizes
from tokenmerge.adapters.hf import MERGED_TOKENS, TOWERS, RefusedOptions, check_host, find_towers, hf_names
from tokenmerge.adapters.timm_vit import TimmViT
from tokenmerge.adapters.within import Within

__all__ = ["HFTimm"]

_WRAPPERS = dict.fromkeys(("TimmWrapperModel", "TimmWrapperForImageClassification"), ("timm_model",))
TOWERS.update(_WRAPPERS)


class HFTimm(Within):
    """Without a path it describes no model yet; `resolve` gives the adapter for one."""

    name = "hf_timm"
    families = "transformers' TimmWrapperModel and TimmWrapperForImageClassification, alone or inside a larger model"

    def __init__(self, path: str = "timm_model", inner: Adapter | None = None) -> None:
        super().__init__(path, inner or TimmViT())
        vars(self).update(name=HFTimm.name, families=HFTimm.families)
        # the wrapper's own forward may call them: what it hands out is guarded by its options
        self.token_methods = ()  # type: ignore[misc]

    def matches(self, model: nn.Module) -> bool:
        return bool(find_towers(model, _WRAPPERS))

    def resolve(self, model: nn.Module) -> Adapter:
        from tokenmerge.adapters import find

        check_host(model)
        wrapper, _, inside = find_towers(model, _WRAPPERS)[0]
        path = f"{wrapper}.{inside}".lstrip(".")
        return HFTimm(path, find(model.get_submodule(path)))

    def loops(self, model: nn.Module) -> list[nn.Module]:
        return [model.get_submodule(self.path.rpartition(".")[0]), *super().loops(model)]

    def grid_head(self, model: nn.Module) -> str | None:
        if _WRAPPERS.keys() & hf_names(model):
            return super().grid_head(model)
        return f"{type(model).__qualname__} is not known to use the class token alone"

    def head(self, model: nn.Module, sizes: Sizes) -> tuple[list[Replacement], list[str]]:
        replacements, limits = super().head(model, sizes)
        hands_out = "TimmWrapperModel" in hf_names(model)
        return replacements, [*limits, MERGED_TOKENS] if hands_out else limits

    def finish(self, model: Any, is_merging: Callable[[], bool], restore: str | None) -> list[Replacement]:
        found = super().finish(model, is_merging, restore)
        if restore is None or (restore == "merged" and self.grid_head(model)):
            wrapper = model.get_submodule(self.path.rpartition(".")[0])
            guard = RefusedOptions(wrapper, is_merging, ("output_hidden_states",))
            found.append(Replacement(wrapper, "forward", guard))
        return found

    def tiny(self) -> tuple[nn.Module, Tensor]:
        from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

        sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 4}
        config: Any = TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=sizes, num_labels=10)
        model: nn.Module = TimmWrapperForImageClassification(config)
        return model.eval(), torch.randn(2, 3, 32, 32)
