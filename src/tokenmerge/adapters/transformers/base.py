"""Base class of the transformers adapters: finds the tower, its blocks and layout, and how its outputs are used."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable, Mapping
from operator import attrgetter
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokenmerge._intercept import follow
from tokenmerge._intercept.taps import AttentionTap
from tokenmerge.adapters.base import PROBED, Adapter, Binding, Context, Host, Spec, Surroundings, TokenLayout, has_parts
from tokenmerge.adapters.transformers.interface import InterfaceTap, hf_tap
from tokenmerge.adapters.transformers.options import Checkpointed, RefusedOptions
from tokenmerge.errors import UnsupportedError, UnsupportedModelError

__all__ = [
    "HF",
    "SIZES",
    "TINY",
    "TOKENS_OUT",
    "TOWERS",
    "HFAdapter",
    "InterfaceTap",
    "RefusedOptions",
    "check_host",
    "find_towers",
    "follow_mask",
    "hf_names",
    "no_change",
    "not_known",
    "pair",
]

_OLDEST = (4, 57)
TOKENS_OUT = "last_hidden_state holds one token per place"
_POOLS = ("pooler", "head", "predictor")  # parts of a tower that compute an output from its tokens
# class name endings of models that read the tokens of several blocks
_DENSE = ("ForDepthEstimation", "ForSemanticSegmentation", "ForImageSegmentation", "ForUniversalSegmentation")
_PREFIXES = ("cls_token", "class_embedding", "distillation_token", "register_tokens")  # parameters of the embeddings

# a configuration for tiny models
SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
TINY: dict[str, Any] = SIZES | {"image_size": 32, "patch_size": 8}


def follow_mask(value: Any, kept: Tensor) -> Tensor:
    """Gather a mask for the remaining tokens; raises `UnsupportedError` if it is not a tensor."""
    return follow.mask(_tensor_mask(value), kept)


def _tensor_mask(value: Any) -> Tensor:
    if not isinstance(value, Tensor):  # flex attention's BlockMask
        raise UnsupportedError(
            f"the attention mask is a {type(value).__name__}, which cannot follow merged tokens. Choose "
            "model.set_attn_implementation('sdpa'), leave the mask out, or set handle.r = 0."
        )
    return value


def _real_keys(mask: Any) -> Tensor:
    return follow.keys_of_mask(_tensor_mask(mask))


def no_change(value: Any, kept: Tensor) -> Any:
    """Return an argument unchanged, since it is not per token."""
    return value


# block arguments that transformers 5 passes down from the model's call
_UNCHANGED: dict[str, follow.Follow] = {
    "output_hidden_states": no_change,
    "use_cache": no_change,
    "return_dict": no_change,
    "num_items_in_batch": no_change,  # set by its Trainer, for the loss
    "vision_aspect_ratio": no_change,  # LLaVA-OneVision's, handed down to the blocks of its tower, which ignore it
}


HF = Host(
    package="transformers",
    followers={"attention_mask": follow_mask, **_UNCHANGED},
    padding={"attention_mask": _real_keys},
)


class HFAdapter(Adapter):
    """Base class of transformers families. A subclass names its tower classes and the structure of its blocks."""

    host = HF
    # class of the module whose forward runs the blocks -> possible paths of its list of blocks, in order
    towers: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    # models whose only output is computed from class tokens, or from a mean that we weight
    class_models: ClassVar[frozenset[str]] = frozenset()
    # models that return all tokens, and otherwise only outputs computed from class tokens
    token_models: ClassVar[frozenset[str]] = frozenset()
    # the tiny model: its class, its configuration, the shape of its input
    example: ClassVar[str]
    sizes: ClassVar[Mapping[str, Any]] = TINY
    shape: ClassVar[tuple[int, ...]] = (2, 3, 32, 32)
    # further options of the tower's call that are rejected while merging; `_REASONS` has the reasons
    refused: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        TOWERS.update(cls.towers)

    def matches(self, model: Any) -> bool:
        return "transformers" in sys.modules and bool(find_towers(model, self.towers))

    def resolve(self, model: nn.Module) -> Adapter:
        check_host(model)
        return self

    def tower(self, model: Any) -> tuple[str, Any, str]:
        """Return the module that runs the blocks: its name, the module, and the path from it to its list of blocks."""
        return find_towers(model, self.towers)[0]

    def blocks(self, model: Any) -> list[tuple[str, nn.Module]]:
        name, tower, path = self.tower(model)
        start = ".".join(filter(None, (name, path)))
        return [(f"{start}.{child}", block) for child, block in attrgetter(path)(tower).named_children()]

    def spec(self, block: Any) -> Spec:
        try:
            return super().spec(block)
        except UnsupportedModelError as error:
            written = f"This was written for transformers {_OLDEST[0]}.{_OLDEST[1]} to 5.24."
            raise UnsupportedModelError(f"{error} {written}") from None

    def layout(self, model: Any) -> TokenLayout:
        tower = self.tower(model)[1]
        if getattr(tower.config, "image_size", None) is None:  # no fixed image size
            return TokenLayout(self.prefix(tower), None, None, None)
        height, width = pair(tower.config.image_size)
        patch = pair(tower.config.patch_size)
        grid, prefix = (height // patch[0], width // patch[1]), self.prefix(tower)
        channels = getattr(tower.config, "num_channels", 3)
        return TokenLayout(prefix, grid, prefix + grid[0] * grid[1], (channels, height, width))

    def prefix(self, tower: Any) -> int:
        """Return the number of tokens before the patches."""
        given = (getattr(tower.embeddings, name, None) for name in _PREFIXES)
        return sum(token.shape[-2] if token.dim() == 3 else 1 for token in given if isinstance(token, Tensor))

    def tap(self, block: Any) -> AttentionTap:
        return hf_tap(block, self.spec(block).attn)

    def surroundings(self, model: Any) -> Surroundings:
        name, tower, path = self.tower(model)
        way = _path(model, name)
        # the embeddings belong to the tower or to a module around it
        holders = (getattr(owner, "embeddings", None) for owner in reversed(way))
        embeddings = next((holder for holder in holders if isinstance(holder, nn.Module)), nn.Identity())
        # a user's own module just calls the tower; a subclass of a transformers class may do more and is checked
        around = [module for module in way if hf_names(module)]
        inside = [tower.get_submodule(path[:end]) for end, sign in enumerate(path) if sign == "."]
        # norms after the blocks, which act on each token alone
        norms = [child for child_name, child in tower.named_children() if "norm" in child_name]
        takes_class_tokens = bool(self.class_models.intersection(hf_names(model)[:1]))
        return Surroundings(
            self,
            model,
            trusted=[(module, "forward") for module in (*around, *inside, *norms)],
            loops=[tower],
            cutter=next((m for m in reversed(list(embeddings.modules())) if isinstance(m, nn.Conv2d)), None),
            every=next(filter(None, map(_why_every, way)), None),
            last=None if self.is_plain(model) else not_known(model),
            handed_out=None if takes_class_tokens else TOKENS_OUT,
        )

    def is_plain(self, model: Any) -> bool:
        """Return whether the model only takes class tokens from its tokens, and otherwise returns all tokens."""
        if (self.class_models | self.token_models).intersection(hf_names(model)[:1]):
            return True
        name = self.tower(model)[0]
        is_tower = bool(self.towers.keys() & hf_names(model)) and not is_backbone(model)
        pools = (getattr(module, pool, None) for module in _path(model, name) for pool in _POOLS)
        return is_tower and not any(isinstance(pool, nn.Module) for pool in pools)

    def sample(self, model: nn.Module, block: nn.Module, layout: TokenLayout) -> tuple[int, dict[str, Any]]:
        # arguments without a default (masks)
        parameters = list(inspect.signature(type(block).forward).parameters.values())[2:]
        asked = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
        return layout.prefix + PROBED, dict.fromkeys(asked)

    def overrides(self, model: Any, context: Context) -> list[Binding]:
        name, restore, around = self.tower(model)[0], context.restore, self.surroundings(model)
        needs = ["output_attentions", *self.refused]
        # restore="merged" returns merged hidden states to the user, not to a model that computes on them
        is_tower = bool(self.towers.keys() & hf_names(model))  # or a thin wrapper
        goes_on = around.last is not None and not is_tower
        if restore is None or (restore == "merged" and goes_on):
            needs.append("output_hidden_states")
        depth = len(self.blocks(model))
        is_restored = around.last or (restore is None and around.handed_out)
        right = {0, -depth - 1} | ({depth, -1} if is_restored else set())
        guards = [
            Binding(owner, "forward", RefusedOptions(owner, context.is_merging, tuple(needs), right))
            for owner in _path(model, name)
            if hasattr(owner, "config")
        ]
        checkpointed = [
            Binding(block, "forward", Checkpointed(block, context.is_merging))
            for _, block in self.blocks(model)
            # transformers 5 checkpoints in the class's forward; transformers 4 in __call__, which is unchanged
            if hasattr(block, "gradient_checkpointing") and type(block).__call__ is nn.Module.__call__
        ]
        return [*checkpointed, *guards]

    def tiny(self) -> tuple[nn.Module, Tensor]:
        import transformers

        cls: Any = getattr(transformers, self.example)
        return cls(cls.config_class(**self.sizes)).eval(), torch.randn(self.shape)


def hf_names(module: nn.Module) -> list[str]:
    """Return the names of the module's classes that transformers defines, most derived first."""
    return [cls.__name__ for cls in type(module).__mro__ if _is_hosts(cls)]


def _is_hosts(thing: Any) -> bool:
    return str(thing.__module__).startswith("transformers.")


def is_backbone(module: nn.Module) -> bool:
    """Return whether the module is a backbone, which returns hidden states without being asked."""
    return any(name.endswith("Backbone") for name in hf_names(module))


def not_known(model: nn.Module) -> str:
    """Return the reason why tokens are restored for a model that wraps a tower."""
    return f"{type(model).__qualname__} is not known to use the class token alone"


def _why_every(module: Any) -> str | None:
    """Return why a transformers module reads the output of several blocks, or of a block before the last; else None."""
    config, name = getattr(module, "config", None), type(module).__qualname__
    if is_backbone(module) or any(name.endswith(_DENSE) for name in hf_names(module)):
        return f"{name} reads the tokens of several blocks"
    if getattr(config, "deepstack_visual_indexes", None):
        return f"{name} reads the tokens of several blocks (DeepStack)"
    if getattr(config, "use_weighted_layer_sum", False):
        return f"{name} takes a weighted sum over what leaves its blocks (use_weighted_layer_sum)"
    layers = getattr(config, "vision_feature_layer", getattr(config, "vision_feature_layers", None))
    return None if layers in (None, -1, [-1], (-1,)) else f"{name} takes its tokens after layer {layers}"


def pair(size: int | Iterable[int]) -> tuple[int, int]:
    """Return height and width of a size given as one number or two."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


TOWERS: dict[str, tuple[str, ...]] = {}  # of all families, to detect a second tower


def find_towers(model: nn.Module, towers: Mapping[str, tuple[str, ...]]) -> list[tuple[str, Any, str]]:
    """Return the towers in the model, each as (name, module, path from it to its list of blocks)."""
    found: list[tuple[str, Any, str]] = []
    for name, module in model.named_modules():
        path = next(
            (path for cls in hf_names(module) for path in towers.get(cls, ()) if has_parts(module, (path,))), None
        )
        # a tower inside a tower counts as one
        if path is not None and not any(name.startswith(f"{outer}." if outer else "") for outer, _, _ in found):
            found.append((name, module, path))
    return found


def _path(model: nn.Module, name: str) -> list[nn.Module]:
    """Return the modules on the path from the model to the named one, both included."""
    parts = name.split(".") if name else []
    return [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts) + 1)]


def check_host(model: nn.Module) -> None:
    """Raise `UnsupportedModelError` if transformers is too old, or if the model has more than one tower."""
    version = str(sys.modules["transformers"].__version__)
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if numbers < _OLDEST:
        raise UnsupportedModelError(
            f"transformers {version} is installed; its models are supported from {_OLDEST[0]}.{_OLDEST[1]} on. "
            f"Install transformers>={_OLDEST[0]}.{_OLDEST[1]}."
        )
    names = [name for name, _, _ in find_towers(model, TOWERS)]
    if len(names) > 1:
        raise UnsupportedModelError(
            f"{type(model).__qualname__} holds {len(names)} towers: {', '.join(names)}. Patch those that shall merge "
            f"one by one, e.g. patch(model.{names[0]}, r=8, restore='dense')."
        )
