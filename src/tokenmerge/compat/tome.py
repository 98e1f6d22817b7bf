"""The surface of the ToMe package: `from tokenmerge.compat import tome` in place of `import tome`.

`tome.patch.timm / swag / mae(model)`, then `model.r` and `model._tome_info`; `tome.utils`, `tome.merge`,
`tome.make_visualization`. The models are patched by `tokenmerge.patch`, so they keep their class and can be unpatched.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tokenmerge import api
from tokenmerge import functional as merge
from tokenmerge.errors import UnsupportedModelError
from tokenmerge.schedule import parse_r

__all__ = ["make_visualization", "merge", "patch", "utils", "vis"]


def _patcher(*families: str) -> Callable[..., api.Handle]:
    def apply_patch(model: nn.Module, trace_source: bool = False, prop_attn: bool = True) -> api.Handle:
        """Patch the model with `model.r = 0`; set `model.r` to merge, read `model._tome_info` after a forward.

        With `trace_source` the info holds `source` `[B, M, N]`. Returns the handle, whose `remove()` takes all back.
        """
        handle = api.patch(model, r=0, prop_attn=prop_attn, track=trace_source)
        if handle.report().adapter not in families:
            found = handle.report().adapter
            handle.remove()
            raise UnsupportedModelError(
                f"this patch is for {' or '.join(families)} models, the model is one of {found!r}."
            )
        prefix = handle.prefix
        model.__dict__["r"] = 0
        model.__dict__["_tome_info"] = {
            "r": 0,
            "size": None,
            "source": None,
            "trace_source": trace_source,
            "prop_attn": prop_attn,
            "class_token": prefix >= 1,
            "distill_token": prefix >= 2,
        }
        hooks = [model.register_forward_pre_hook(_read_settings), model.register_forward_hook(_write_info)]
        handle.on_remove(_Cleanup(model, hooks))
        return handle

    return apply_patch


def _read_settings(model: nn.Module, args: tuple[Any, ...]) -> None:
    handle, info = api.handle_of(model), model.__dict__["_tome_info"]
    if handle.r != model.r:
        handle.r = model.r  # type: ignore[assignment]
    if handle.track != info["trace_source"]:
        handle.track = info["trace_source"]


def _write_info(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    handle, info = api.handle_of(model), model.__dict__["_tome_info"]
    depth = len(handle.tokens)
    info["r"] = [model.r] * depth if callable(model.r) else parse_r(depth, model.r)  # type: ignore[arg-type]
    was_merged = handle.has_merged
    info["size"] = handle.sizes[..., None] if was_merged else None
    info["source"] = _source(handle.groups[-1], handle.sizes.shape[1]) if was_merged and handle.track else None


def _source(groups: Tensor, tokens: int) -> Tensor:  # [B, N] -> [B, M, N]
    slots = torch.arange(tokens, device=groups.device)[None, :, None]
    return (groups[:, None, :] == slots).float()


class _Cleanup:
    """Takes the attributes and hooks of this surface off again."""

    def __init__(self, model: nn.Module, hooks: list[Any]) -> None:
        self.model, self.hooks = model, hooks

    def __call__(self) -> None:
        for hook in self.hooks:
            hook.remove()
        for name in ("r", "_tome_info"):
            self.model.__dict__.pop(name, None)


def _benchmark(
    model: nn.Module,
    device: Any = 0,
    input_size: tuple[int, ...] = (3, 224, 224),
    batch_size: int = 64,
    runs: int = 40,
    throw_out: float = 0.25,
    use_fp16: bool = False,
    verbose: bool = False,
) -> float:
    """Return the images per second of random batches, the first `throw_out` of the runs left out.

    Raises `UnsupportedError` where the device is not there. `use_fp16` runs under autocast.
    """
    from tokenmerge.tools.timing import throughput

    return throughput(
        model, device, tuple(input_size), batch_size, runs=runs, throw_out=throw_out, use_fp16=use_fp16, verbose=verbose
    )


def make_visualization(img: Any, source: Tensor, patch_size: int = 16, class_token: bool = True) -> Any:
    """Draw each group of a PIL image in its mean colour with a border; `source` is `[1, M, N]` of one image."""
    from tokenmerge.tools.visualize import draw_groups

    groups = source[0].argmax(dim=0)[int(class_token) :]
    return draw_groups(img, groups, patch_size=patch_size)


patch = SimpleNamespace(timm=_patcher("timm_vit"), swag=_patcher("swag"), mae=_patcher("mae", "timm_vit"))
utils = SimpleNamespace(benchmark=_benchmark, parse_r=parse_r)
vis = SimpleNamespace(make_visualization=make_visualization)
