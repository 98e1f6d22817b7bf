"""TokenLearner: a few learned maps each pool all tokens into one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from tokenmerge.errors import UnsupportedError
from tokenmerge.methods.base import FROM_ONE, Limits, ModelShape, TokenView, Variants
from tokenmerge.methods.learned import Learned, module_of
from tokenmerge.plan import MatrixPlan

__all__ = ["TokenLearner"]


@dataclass(frozen=True)
class TokenLearner(Learned):
    """Pool the patches into S tokens by S learned maps. Ryoo et al., NeurIPS 2021, arXiv:2106.11297.

    S is the number of patches that `r` leaves: `r=[0] * 6 + [180]` leaves 16 of 196 patches at mid depth, as in the
    paper. `hidden` is the width of the maps' MLP. Training and inference are the same. Raises `UnsupportedError` for a
    model whose number of tokens is unknown, and for a forward with another number.

    Published: ViT-B/16 pretrained on JFT has 83.7 % at 28.7 GMACs (84.7 at 55.6). Differs from the paper: a map is the
    softmax of an MLP over the tokens (the paper's second version), weighted by size if tokens were merged before; no
    TokenFuser restores the tokens; the maps fit only the planned number of tokens.
    """

    name: ClassVar[str] = "tokenlearner"
    leaves = "one"
    limits: ClassVar[Limits] = {"hidden": FROM_ONE}
    is_proportional: ClassVar[bool] = False
    variants: ClassVar[Variants] = ({"hidden": 16},)

    hidden: int = 64

    def make(self, shape: ModelShape) -> nn.ModuleDict:
        if shape.tokens is None or shape.removed is None:
            raise UnsupportedError(
                "tokenlearner has one map per token it leaves, and this model does not say how many tokens it has."
            )
        left = {at: shape.tokens[at] - shape.prefix - shape.removed[at] for at in shape.active if shape.removed[at]}
        return nn.ModuleDict({str(layer): _Maps(shape.width, self.hidden, maps) for layer, maps in left.items()})

    def plan(self, view: TokenView, r: int) -> MatrixPlan:
        learned = module_of(view, self)
        B, n, _ = view.stream.shape
        assert isinstance(learned, _Maps)
        if n - view.prefix - r != learned.maps:
            raise UnsupportedError(
                f"tokenlearner has {learned.maps} maps at block {view.layer} and is to leave {n - view.prefix - r} of "
                f"{n - view.prefix} tokens. Its maps are made for the r and the input size at patching: patch anew."
            )
        logit = learned(view.x[:, view.prefix :]).float().mT  # [B, S, N - prefix]
        if view.valid is not None:
            # finite, so that an image of only padding gives no NaN
            logit = logit.masked_fill(~view.valid[:, None, view.prefix :], -1e4)
        maps = logit.softmax(dim=-1)
        places = torch.arange(n, device=maps.device)
        front = torch.eye(view.prefix, n, device=maps.device).expand(B, -1, -1)
        weight = torch.cat((front, nn.functional.pad(maps, (view.prefix, 0))), dim=1)
        keep = torch.cat((places[: view.prefix].expand(B, -1), maps.argmax(dim=-1) + view.prefix), dim=1)
        return MatrixPlan(weight=weight, keep=keep, n=n)


class _Maps(nn.Module):
    """An MLP from a token to its logit in each map."""

    def __init__(self, width: int, hidden: int, maps: int) -> None:
        super().__init__()
        self.maps = maps
        self.layers = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, maps))

    def forward(self, x: Tensor) -> Tensor:  # [B, N, C]
        logit: Tensor = self.layers(x)
        return logit
