"""transformers' wrapper around timm's models: the timm model inside is described by its own adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tokenmerge._intercept.trust import stranger
from tokenmerge.adapters.base import Adapter, Binding
from tokenmerge.adapters.timm.vit import TimmViT
from tokenmerge.adapters.transformers.base import TOWERS, RefusedOptions, check_host, find_towers, hf_names
from tokenmerge.adapters.within import Within

__all__ = ["HFTimm"]

_WRAPPERS = dict.fromkeys(("TimmWrapperModel", "TimmWrapperForImageClassification"), ("timm_model",))
TOWERS.update(_WRAPPERS)


class HFTimm(Within):
    """Without a path it describes no model yet; `resolve` gives the adapter for one."""

    name = "hf_timm"
    families = "transformers' TimmWrapperModel and TimmWrapperForImageClassification, alone or inside a larger model"

    def __init__(self, path: str = "timm_model", inner: Adapter | None = None, hands_tokens_out: bool = True) -> None:
        super().__init__(path, inner or TimmViT())
        vars(self).update(name=HFTimm.name, families=HFTimm.families)
        if not hands_tokens_out:
            return
        # the wrapper's own forward calls them
        self.token_methods = ()  # type: ignore[misc]

    def matches(self, model: nn.Module) -> bool:
        return bool(find_towers(model, _WRAPPERS))

    def resolve(self, model: nn.Module) -> Adapter:
        from tokenmerge.adapters import find

        check_host(model)
        wrapper, _, inside = find_towers(model, _WRAPPERS)[0]
        path = f"{wrapper}.{inside}".lstrip(".")
        hands_tokens_out = "TimmWrapperForImageClassification" not in hf_names(model)
        return HFTimm(path, find(model.get_submodule(path)), hands_tokens_out)

    def looping_parts(self, model: nn.Module) -> list[nn.Module]:
        return [model.get_submodule(self.path.rpartition(".")[0]), *super().looping_parts(model)]

    def collects(self, model: nn.Module) -> str | None:
        names = self.path.split(".")[:-1]
        around = [model.get_submodule(".".join(names[:depth])) for depth in range(len(names) + 1)]
        own = [(module, "forward") for module in around if hf_names(module)]
        return stranger(own, "transformers") or super().collects(model)

    def grid_head(self, model: nn.Module) -> str | None:
        if _WRAPPERS.keys() & hf_names(model):
            return self.inner.grid_head(self.part(model))
        return f"{type(model).__qualname__} is not known to use the class token alone"

    def hands_out(self, model: nn.Module) -> str | None:
        if "TimmWrapperModel" in hf_names(model):
            return "last_hidden_state holds one token per place"
        return self.inner.hands_out(self.part(model))

    def finish(self, model: Any, is_merging: Callable[[], bool], restore: str | None) -> list[Binding]:
        found = super().finish(model, is_merging, restore)
        if restore is None or (restore == "merged" and self.grid_head(model)):
            wrapper = model.get_submodule(self.path.rpartition(".")[0])
            guard = RefusedOptions(wrapper, is_merging, ("output_hidden_states",))
            found.append(Binding(wrapper, "forward", guard))
        return found

    def tiny(self) -> tuple[nn.Module, Tensor]:
        from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

        sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 4}
        config: Any = TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=sizes, num_labels=10)
        model: nn.Module = TimmWrapperForImageClassification(config)
        return model.eval(), torch.randn(2, 3, 32, 32)
