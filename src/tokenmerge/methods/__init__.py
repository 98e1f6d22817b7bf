"""The reduction methods, in the order the documentation shows them."""

from __future__ import annotations

from tokenmerge.errors import ConfigError, UnknownNameError, unknown_name
from tokenmerge.fields import check_options, read_call
from tokenmerge.methods.base import Reduction as Reduction
from tokenmerge.methods.base import TokenView as TokenView
from tokenmerge.methods.learned import NEW as NEW
from tokenmerge.methods.learned import Learned as Learned

# one line per method, in the order of the documentation; each imported class that has a `name` is registered
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

_METHODS: dict[str, type[Reduction]] = {
    kind.name: kind
    for kind in [*globals().values()]
    if isinstance(kind, type) and issubclass(kind, Reduction) and hasattr(kind, "name")
}


def list_methods() -> list[str]:
    """Return the names that `patch` accepts."""
    return list(_METHODS)


def find(name: str) -> type[Reduction]:
    """Return the method class of that name; raises `UnknownNameError` with the nearest one."""
    if name not in _METHODS:
        raise unknown_name("method", name, _METHODS)
    return _METHODS[name]


def parse(text: str) -> Reduction:
    """Return the method for a name, or for a name with options.

    Raises `UnknownNameError` (with the nearest name) for an unknown name or option, and `ConfigError` for any other
    text.

    >>> parse("tome(metric='x')")
    ToMe(metric='x', heads='mean', distance='cosine', combine='weighted', partition='alternating', seed=0)
    """
    shown = text if len(text) < 200 else f"{text[:200]} ..."
    if "(" not in text:
        return find(shown)()
    try:
        name, given = read_call(text)
    except ValueError as error:
        raise ConfigError(
            f"{shown!r} is no method: give a name (`tokenmerge list`), one with options as tome(metric='x'), each "
            "once, by its name and with a plain value, a saved configuration (.json), or a folder that "
            "`tokenmerge train` wrote."
        ) from error
    method = find(name)
    check_options(method, given)
    return method(**given)


def register(method: type[Reduction]) -> type[Reduction]:
    """Add a method from outside the library under its `name` (a class decorator); raises if the name is taken."""
    if method.name in _METHODS:
        raise UnknownNameError(f"method name {method.name!r} is taken by {_METHODS[method.name].__qualname__}.")
    _METHODS[method.name] = method
    return method
