"""Every method, one line each, in the order of the documentation. Imported when a method other than ToMe is named."""

from __future__ import annotations

from tokenmerge.methods import base

# isort: off
from tokenmerge.methods.tome import ToMe as ToMe
from tokenmerge.methods.tofu import ToFu as ToFu
from tokenmerge.methods.pitome import PiToMe as PiToMe
from tokenmerge.methods.mctf import MCTF as MCTF
from tokenmerge.methods.diffrate import DiffRate as DiffRate
from tokenmerge.methods.ppt import PPT as PPT
from tokenmerge.methods.atm import ATM as ATM
from tokenmerge.methods.mame import MaMe as MaMe
from tokenmerge.methods.greedy import Greedy as Greedy
from tokenmerge.methods.tomecis import ToMeCIS as ToMeCIS
from tokenmerge.methods.least_loss import LeastLoss as LeastLoss
from tokenmerge.methods.dsm import DSM as DSM
from tokenmerge.methods.evit import EViT as EViT
from tokenmerge.methods.attention_prune import AttentionPrune as AttentionPrune
from tokenmerge.methods.random_prune import RandomPrune as RandomPrune
from tokenmerge.methods.ats import ATS as ATS
from tokenmerge.methods.token_pooling import TokenPooling as TokenPooling
from tokenmerge.methods.zero_tprune import ZeroTPrune as ZeroTPrune
from tokenmerge.methods.gtp import GTP as GTP
from tokenmerge.methods.algm import ALGM as ALGM
from tokenmerge.methods.mpm import MPM as MPM
from tokenmerge.methods.vid_tldr import VidTLDR as VidTLDR
from tokenmerge.methods.tome2d import ToMe2D as ToMe2D
from tokenmerge.methods.dynamicvit import DynamicViT as DynamicViT
from tokenmerge.methods.avit import AViT as AViT
from tokenmerge.methods.adavit import AdaViT as AdaViT
from tokenmerge.methods.spvit import SPViT as SPViT
from tokenmerge.methods.tokenlearner import TokenLearner as TokenLearner
from tokenmerge.methods.dtem import DTEM as DTEM
from tokenmerge.methods.ltmp import LTMP as LTMP
from tokenmerge.methods.drop import Drop as Drop
# isort: on

METHODS: dict[str, type[base.Reduction]] = {
    kind.name: kind for kind in [*globals().values()] if isinstance(kind, type) and issubclass(kind, base.Reduction)
}
