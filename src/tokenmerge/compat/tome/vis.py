"""`tome.vis`: a picture of what was merged."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tokenmerge.tools.visualize import draw_groups

__all__ = ["make_visualization"]


def make_visualization(img: Any, source: Tensor, patch_size: int = 16, class_token: bool = True) -> Any:
    """Draw each group of a PIL image in its mean colour with a border; `source` is `[1, M, N]` of one image."""
    return draw_groups(img, source[0].argmax(dim=0)[int(class_token) :], patch_size=patch_size)
