"""What all transformers models share: the tower inside, its blocks and layout, what their outputs may be used for."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from operator import attrgetter
from typing import Any, ClassVar

from torch import Tensor, nn

from tokenmerge.adapters import follow
from tokenmerge.adapters.base import Adapter, BlockSpec, HookSpec, Replacement, Sizes, TokenLayout
from tokenmerge.adapters.hf_interface import InterfaceTap, hf_tap
from tokenmerge.adapters.hf_options import Checkpointed, RefusedOptions
from tokenmerge.adapters.taps import AttentionTap
from tokenmerge.errors import UnsupportedError, UnsupportedModelError

__all__ = [
    "MERGED_TOKENS",
    "TINY",
    "TOWERS",
    "HFAdapter",
    "InterfaceTap",
    "RefusedOptions",
    "check_host",
    "find_towers",
    "follow_mask",
    "hf_names",
    "no_change",
    "pair",
]

_OLDEST = (4, 57)
_PREFIXES = ("cls_token", "class_embedding", "distillation_token", "register_tokens")  # parameters of the embeddings

# a configuration for tiny models
TINY: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
TINY |= {"image_size": 32, "patch_size": 8}
MERGED_TOKENS = "last_hidden_state holds the merged tokens; restore='dense' hands out every token in its place"


def follow_mask(value: Any, kept: Tensor) -> Tensor:
    """Let a mask follow the tokens that are left; raises `UnsupportedError` for one that is no tensor."""
    return follow.mask(_tensor_mask(value), kept)


def _tensor_mask(value: Any) -> Tensor:
    if not isinstance(value, Tensor):  # flex attention's BlockMask
        raise UnsupportedError(
            f"the attention mask is a {type(value).__name__}, which cannot follow merged tokens. Choose "
            "model.set_attn_implementation('sdpa'), leave the mask out, or set handle.r = 0."
        )
    return value


def no_change(value: Any, kept: Tensor) -> Any:
    """Hand on an argument that does not belong to tokens."""
    return value


# arguments of blocks that transformers 5 hands down from the model's own call
_UNCHANGED: dict[str, follow.Follow] = {
    "output_hidden_states": no_change,
    "use_cache": no_change,
    "num_items_in_batch": no_change,  # of its Trainer, for the loss
}


class HFAdapter(Adapter):
    """A family of transformers models. A subclass says which classes are its towers and how its blocks are made."""

    followers: ClassVar[Mapping[str, follow.Follow]] = {"attention_mask": follow_mask, **_UNCHANGED}
    # class of the module whose forward runs the blocks -> where its list of blocks can be, tried in order
    towers: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    specs: ClassVar[tuple[BlockSpec, ...]]  # the first whose children a block has describes it
    # models that use nothing but the class token of what the blocks put out (or only hand it on)
    token_models: ClassVar[frozenset[str]] = frozenset()
    # further options of the tower's call that are refused while tokens are merged; `_REASONS` says why
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
        """Return the module that runs the blocks: its name, itself, the path from it to its list of blocks."""
        return find_towers(model, self.towers)[0]

    def blocks(self, model: Any) -> list[tuple[str, nn.Module]]:
        name, tower, path = self.tower(model)
        start = ".".join(filter(None, (name, path)))
        return [(f"{start}.{child}", block) for child, block in attrgetter(path)(tower).named_children()]

    def spec(self, block: Any) -> BlockSpec | HookSpec:
        for spec in self.specs:
            if all(_has(block, child) for child in filter(None, (*spec.attention, *spec.mlp, spec.closes))):
                return spec
        raise UnsupportedModelError(
            f"blocks of class {type(block).__module__}.{type(block).__qualname__} with the children "
            f"{[name for name, _ in block.named_children()]} are not described. This was written for transformers "
            f"{_OLDEST[0]}.{_OLDEST[1]} to 5.24."
        )

    def layout(self, model: Any) -> TokenLayout:
        tower = self.tower(model)[1]
        if getattr(tower.config, "image_size", None) is None:  # images of any size and shape
            return TokenLayout(self.prefix(tower), None, None, None)
        height, width = pair(tower.config.image_size)
        patch = pair(tower.config.patch_size)
        grid, prefix = (height // patch[0], width // patch[1]), self.prefix(tower)
        channels = getattr(tower.config, "num_channels", 3)
        return TokenLayout(prefix, grid, prefix + grid[0] * grid[1], (channels, height, width))

    def prefix(self, tower: Any) -> int:
        """Return how many tokens stand in front of the patches."""
        given = (getattr(tower.embeddings, name, None) for name in _PREFIXES)
        return sum(token.shape[-2] if token.dim() == 3 else 1 for token in given if isinstance(token, Tensor))

    def tap(self, block: Any) -> AttentionTap:
        return hf_tap(attrgetter(self.spec(block).attn)(block))

    def grid_head(self, model: Any) -> str | None:
        # a subclass with a forward of its own may do anything
        if self.token_models.intersection(hf_names(model)[:1]) and _is_hosts(type(model).forward):
            return None
        return f"{type(model).__qualname__} is not known to use the class token alone"

    def head(self, model: Any, sizes: Sizes) -> tuple[list[Replacement], list[str]]:
        if type(model).__name__.endswith(("Classification", "ForImageClassificationWithTeacher")):
            return [], []
        return [], [MERGED_TOKENS]

    def sample(self, model: nn.Module, block: nn.Module, layout: TokenLayout) -> tuple[int, dict[str, Any]]:
        # masks that a block has no default for
        parameters = list(inspect.signature(type(block).forward).parameters.values())[2:]
        asked = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
        return layout.prefix + 5, dict.fromkeys(asked)

    def valid(self, given: Mapping[str, Any]) -> Tensor | None:
        mask = given.get("attention_mask")
        return None if mask is None else follow.keys_of_mask(_tensor_mask(mask))

    def finish(self, model: Any, is_merging: Callable[[], bool], restore: str | None) -> list[Replacement]:
        name, tower, _ = self.tower(model)
        needs = ["output_attentions", *self.refused]
        is_backbone = type(tower).__name__.endswith("Backbone")
        # merged hidden states are for those who asked for them, not for a model that goes on computing with them
        is_tower = bool(self.towers.keys() & hf_names(model))  # or a thin shell around it
        goes_on = is_backbone or (self.grid_head(model) is not None and not is_tower)
        if restore is None or (restore == "merged" and goes_on):
            needs.append("output_hidden_states")
        depth = len(self.blocks(model))
        right = {0, -depth - 1} | ({depth, -1} if self.grid_head(model) else set())
        guards = [
            Replacement(owner, "forward", RefusedOptions(owner, is_merging, tuple(needs), right, always))
            for owner in _path(model, name)
            if hasattr(owner, "config")
            # a backbone is there for its hidden states: it hands them out unasked
            for always in ("output_hidden_states" if is_backbone and owner is tower else "",)
        ]
        checkpointed = [
            Replacement(block, "forward", Checkpointed(block, is_merging))
            for _, block in self.blocks(model)
            # transformers 5 checkpoints in the class's forward, transformers 4 in __call__, which we leave alone
            if hasattr(block, "gradient_checkpointing") and type(block).__call__ is nn.Module.__call__
        ]
        return [*checkpointed, *guards]


def hf_names(module: nn.Module) -> list[str]:
    """Return the names of the module's classes that transformers defines, most derived first."""
    return [cls.__name__ for cls in type(module).__mro__ if _is_hosts(cls)]


def _is_hosts(thing: Any) -> bool:
    return str(thing.__module__).startswith("transformers.")


def pair(size: int | Iterable[int]) -> tuple[int, int]:
    """Return height and width of a size given as one number or two."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


TOWERS: dict[str, tuple[str, ...]] = {}  # of all families: no second tower in a model may be overlooked


def find_towers(model: nn.Module, towers: Mapping[str, tuple[str, ...]]) -> list[tuple[str, Any, str]]:
    """Return the towers in the model: their names, themselves, the path from each to its list of blocks."""
    found: list[tuple[str, Any, str]] = []
    for name, module in model.named_modules():
        path = next((path for cls in hf_names(module) for path in towers.get(cls, ()) if _has(module, path)), None)
        # a tower inside a tower is the same one
        if path is not None and not any(name.startswith(f"{outer}." if outer else "") for outer, _, _ in found):
            found.append((name, module, path))
    return found


def _path(model: nn.Module, name: str) -> list[nn.Module]:
    """Return the modules from the model to the one of this name, both included."""
    parts = name.split(".") if name else []
    return [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts) + 1)]


def _has(module: nn.Module, path: str) -> bool:
    try:
        attrgetter(path)(module)
    except AttributeError:
        return False
    return True


def check_host(model: nn.Module) -> None:
    """Raise `UnsupportedModelError` for a version that is too old, and for a model with more towers than one."""
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
