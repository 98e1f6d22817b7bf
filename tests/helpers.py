"""Comparisons that assert inside, and models whose one-dimensional parameters hide nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tokenmerge.measure.outputs import answer
from tokenmerge.methods import TokenView

__all__ = [
    "TOLERANCE",
    "answer",
    "assert_close",
    "bound_attributes",
    "randomised",
    "run_in_threads",
    "shortened",
    "tiny_of",
    "tiny_vit",
    "view_of",
]

# rounding of one forward, relative to the largest value
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 1e-2}


def assert_close(got: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
    """Fail with both extremes where two tensors differ by more than the tolerance of their dtype."""
    assert got.shape == expected.shape, f"{tuple(got.shape)} is not {tuple(expected.shape)}"
    tolerance = TOLERANCE[got.dtype] if tolerance is None else tolerance
    difference = (got.double() - expected.double()).abs().max().item() if got.numel() else 0.0
    scale = max(1.0, expected.double().abs().max().item()) if got.numel() else 1.0
    assert difference <= tolerance * scale, f"max |difference| {difference:.3g}, largest value {scale:.3g}"


def randomised(model: nn.Module) -> nn.Module:
    """Draw every parameter so that a forgotten one shows: norms, biases, layer scale, and weights that mix tokens."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                parameter.normal_(0.5, 0.5)
            elif "pos_embed" in name or "token" in name or "latent" in name:
                parameter.normal_()
            else:
                # twice the usual width: attention that is not flat, so that it matters which tokens are there
                parameter.normal_(0.0, 2 * parameter[0].numel() ** -0.5)
    return model


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


def tiny_of(adapter: Any) -> tuple[nn.Module, Tensor]:
    """A family's own small model and an input for it; skips where its host is missing or older than the family."""
    try:
        return adapter.tiny()  # type: ignore[no-any-return]
    except ModuleNotFoundError:
        if adapter.host.package:
            pytest.importorskip(adapter.host.package, _SINCE.get(adapter.name))
        raise


def tiny_vit(**options: Any) -> nn.Module:
    """A small timm VisionTransformer with randomised parameters, in eval mode."""
    from timm.models.vision_transformer import VisionTransformer

    settings = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 4, "num_classes": 10}
    return randomised(VisionTransformer(**{**settings, **options})).eval()


def view_of(B: int = 3, N: int = 26, prefix: int = 1, dtype: torch.dtype = torch.float32, **given: Any) -> TokenView:
    """A view of the second of four blocks with every field set; a square grid where one fits."""
    q, k, v = (torch.randn(B, 3, N, 8, dtype=dtype) for _ in range(3))
    x, x_pre = torch.randn(B, N, 24, dtype=dtype), torch.randn(B, N, 24, dtype=dtype)
    size = torch.randint(1, 5, (B, N)).float()
    n = N - prefix
    rows = next(row for row in range(int(n**0.5), 0, -1) if n % row == 0)
    view = TokenView(x, x_pre, q, k, v, size, prefix, (rows, n // rows), layer=1, depth=4, memory={})
    return replace(view, **given)


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


def run_in_threads(work: Callable[[int], None], count: int) -> None:
    """Call `work(0)` ... `work(count - 1)` at once, each in a thread of its own, and wait for all."""
    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
