"""Comparisons that assert inside, and models whose one-dimensional parameters hide nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tokenmerge.measure.outputs import answer
from tokenmerge.testing.comparing import TOLERANCE, assert_close
from tokenmerge.testing.lives import run_in_threads
from tokenmerge.testing.models.drawn import randomised, tiny_vit
from tokenmerge.testing.views import view_of

__all__ = [
    "TOLERANCE",
    "answer",
    "assert_close",
    "bound_attributes",
    "randomised",
    "replayed",
    "run_in_threads",
    "shortened",
    "tiny_of",
    "tiny_vit",
    "view_of",
]


def shortened(model: nn.Module, adapter: Any) -> nn.Module:
    """Leave out all blocks but two: one that merges tokens of size 1, and one that is handed sizes by another.

    A trace takes time for every block, and finds nothing in a third one.
    """
    gone = {block for _, block in adapter.blocks(model)[2:]}
    assert gone
    for module in list(model.modules()):
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            for place in reversed(range(len(module))):
                if module[place] in gone:
                    del module[place]
    assert len(adapter.blocks(model)) == 2
    return model


# the first version of a host that has a family, where it is newer than the oldest supported one
_SINCE = {"timm_vlm": "1.0.30"}
_SINCE |= dict.fromkeys(
    ("hf_radio", "hf_mlcd", "hf_llama4", "hf_gemma4", "hf_qwen_vision", "hf_pixtral", "hf_vitpose", "hf_speech"), "5.24"
)


def tiny_of(adapter: Any) -> tuple[nn.Module, Tensor]:
    """A family's own small model and an input for it; skips where its host is missing or older than the family."""
    if adapter.name in _SINCE:
        pytest.importorskip(adapter.host.package, _SINCE[adapter.name])
    try:
        return adapter.tiny()  # type: ignore[no-any-return]
    except ModuleNotFoundError:
        if adapter.host.package:
            pytest.importorskip(adapter.host.package)
        raise


def replayed(trace: Any) -> tuple[list[Tensor], list[Tensor]]:
    """For every input token the place of the token that leads its group after each block: by the pairs alone, and by
    `groups` and `kept`. A block that mixes is skipped, and what comes after it starts from its groups."""
    by_pairs, by_groups = [], []
    lead = torch.arange(trace.blocks[0].groups.shape[1]).expand_as(trace.blocks[0].groups)
    for block in trace.blocks:
        new = lead.clone()
        for image, (gone, into) in enumerate(zip(block.gone.tolist(), block.into.tolist(), strict=True)):
            for token, leader in zip(gone, into, strict=True):
                new[image][lead[image] == token] = leader
        named = block.kept.gather(1, block.groups.clamp_min(0)).masked_fill(block.groups < 0, -1)
        lead = named if block.is_mixed else new
        by_pairs.append(lead)
        by_groups.append(named)
    return by_pairs, by_groups


def bound_attributes(model: nn.Module) -> list[str]:
    """Every instance attribute that patching could leave behind."""
    names = ("forward", "pool", "_tokenmerge_handle", "r", "_tome_info")
    # vit-pytorch has a `pool` of its own, a word
    found = [
        f"{path}.{name}"
        for path, module in model.named_modules()
        for name in names
        if name in module.__dict__ and not isinstance(module.__dict__[name], str)
    ]
    hooks = [path for path, module in model.named_modules() if module._forward_hooks or module._forward_pre_hooks]
    return found + hooks
