"""transformers' wrapper around timm models: the timm model inside is described by its own adapter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tokenmerge._intercept.trust import stranger
from tokenmerge.adapters.base import Adapter, Binding, Context, Surroundings
from tokenmerge.adapters.timm.vit import TimmViT
from tokenmerge.adapters.transformers.base import (
    TOKENS_OUT,
    TOWERS,
    RefusedOptions,
    check_host,
    find_towers,
    hf_names,
    not_known,
)
from tokenmerge.adapters.within import Within

__all__ = ["HFTimm"]

_WRAPPERS = dict.fromkeys(("TimmWrapperModel", "TimmWrapperForImageClassification"), ("timm_model",))
TOWERS.update(_WRAPPERS)


class HFTimm(Within):
    """Without a path it describes no model yet; `resolve` returns the adapter for a model."""

    name = "hf_timm"
    families = "transformers' TimmWrapperModel and TimmWrapperForImageClassification, alone or inside a larger model"

    def __init__(self, path: str = "timm_model", inner: Adapter | None = None, hands_tokens_out: bool = True) -> None:
        super().__init__(path, inner or TimmViT())
        vars(self).update(name=HFTimm.name, families=HFTimm.families)
        if hands_tokens_out:  # the wrapper's forward calls them
            vars(self).update(host=replace(self.host, token_methods=()))

    def matches(self, model: nn.Module) -> bool:
        return bool(find_towers(model, _WRAPPERS))

    def resolve(self, model: nn.Module) -> Adapter:
        from tokenmerge.adapters import find

        check_host(model)
        wrapper, _, inside = find_towers(model, _WRAPPERS)[0]
        path = f"{wrapper}.{inside}".lstrip(".")
        hands_tokens_out = "TimmWrapperForImageClassification" not in hf_names(model)
        return HFTimm(path, find(model.get_submodule(path)), hands_tokens_out)

    def surroundings(self, model: nn.Module) -> Surroundings:
        inner = self.inner.surroundings(self.part(model))
        names = self.path.split(".")[:-1]
        around = [model.get_submodule(".".join(names[:depth])) for depth in range(len(names) + 1)]
        own = [(module, "forward") for module in around if hf_names(module)]
        return replace(
            inner,
            loops=[around[-1], *inner.loops],
            every=stranger(own, "transformers") or inner.every,
            last=inner.last if _WRAPPERS.keys() & hf_names(model) else not_known(model),
            handed_out=TOKENS_OUT if "TimmWrapperModel" in hf_names(model) else inner.handed_out,
        )

    def overrides(self, model: Any, context: Context) -> list[Binding]:
        found = super().overrides(model, context)
        if context.restore is None or (context.restore == "merged" and self.surroundings(model).last):
            wrapper = model.get_submodule(self.path.rpartition(".")[0])
            guard = RefusedOptions(wrapper, context.is_merging, ("output_hidden_states",))
            found.append(Binding(wrapper, "forward", guard))
        return found

    def tiny(self) -> tuple[nn.Module, Tensor]:
        from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

        sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 4}
        config: Any = TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=sizes, num_labels=10)
        model: nn.Module = TimmWrapperForImageClassification(config)
        return model.eval(), torch.randn(2, 3, 32, 32)
