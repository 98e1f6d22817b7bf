"""ToMe: the tokens that the vision tower itself has left, when its blocks merge similar ones."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tokenmerge.vlm.methods.base import Chooser, Visual, needs_targets

__all__ = ["ToMe", "tome"]


def tome(targets: Tensor) -> Tensor:
    """Return one index per group: `targets` `[N]` says for each token into which one the tower merged it.

    All tokens of a group have the same features, so one of them stands for all.

    Source: ToMe, ICLR 2023, arXiv:2210.09461, by `tokenmerge.patch` in the vision tower; that its tokens become the
    visual tokens is how the papers on visual tokens compare with it. The language model does not learn how many
    tokens each one stands for.
    """
    left: Tensor = targets.unique()
    return left


@dataclass(frozen=True)
class ToMe(Chooser):
    """Merge in the tower until so many are left, and give the language model these."""

    name = "tome"
    source = "ToMe, ICLR 2023, arXiv:2210.09461"
    merges_tower = True

    def choose(self, visual: Visual, k: int) -> Tensor:
        return tome(needs_targets(visual, self.name))
