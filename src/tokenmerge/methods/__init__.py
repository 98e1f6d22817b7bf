"""The reduction methods, in the order the documentation shows them."""

from __future__ import annotations

import ast
import dataclasses

from tokenmerge.errors import ConfigError, UnknownNameError, unknown_name
from tokenmerge.methods.adavit import AdaViT
from tokenmerge.methods.algm import ALGM
from tokenmerge.methods.atm import ATM
from tokenmerge.methods.ats import ATS
from tokenmerge.methods.attention_prune import AttentionPrune
from tokenmerge.methods.avit import AViT
from tokenmerge.methods.base import Reduction, TokenView
from tokenmerge.methods.diffrate import DiffRate
from tokenmerge.methods.drop import Drop
from tokenmerge.methods.dsm import DSM
from tokenmerge.methods.dtem import DTEM
from tokenmerge.methods.dynamicvit import DynamicViT
from tokenmerge.methods.evit import EViT
from tokenmerge.methods.greedy import Greedy
from tokenmerge.methods.gtp import GTP
from tokenmerge.methods.learned import NEW, Learned
from tokenmerge.methods.ltmp import LTMP
from tokenmerge.methods.mame import MaMe
from tokenmerge.methods.mctf import MCTF
from tokenmerge.methods.mpm import MPM
from tokenmerge.methods.pitome import PiToMe
from tokenmerge.methods.ppt import PPT
from tokenmerge.methods.random_prune import RandomPrune
from tokenmerge.methods.spvit import SPViT
from tokenmerge.methods.tofu import ToFu
from tokenmerge.methods.token_pooling import TokenPooling
from tokenmerge.methods.tokenlearner import TokenLearner
from tokenmerge.methods.tome import ToMe
from tokenmerge.methods.tome2d import ToMe2D
from tokenmerge.methods.tomecis import ToMeCIS
from tokenmerge.methods.vid_tldr import VidTLDR
from tokenmerge.methods.zero_tprune import ZeroTPrune

__all__ = [
    "ALGM",
    "ATM",
    "ATS",
    "AViT",
    "AdaViT",
    "AttentionPrune",
    "DSM",
    "DTEM",
    "DiffRate",
    "Drop",
    "DynamicViT",
    "EViT",
    "GTP",
    "Greedy",
    "LTMP",
    "Learned",
    "MCTF",
    "MPM",
    "MaMe",
    "NEW",
    "PPT",
    "PiToMe",
    "RandomPrune",
    "Reduction",
    "SPViT",
    "ToFu",
    "ToMe",
    "ToMe2D",
    "ToMeCIS",
    "TokenLearner",
    "TokenPooling",
    "TokenView",
    "VidTLDR",
    "ZeroTPrune",
    "find",
    "list_methods",
    "parse",
    "register",
]

_METHODS: dict[str, type[Reduction]] = {
    method.name: method
    for method in (
        ToMe,
        ToFu,
        PiToMe,
        MCTF,
        DiffRate,
        PPT,
        ATM,
        MaMe,
        Greedy,
        ToMeCIS,
        DSM,
        EViT,
        AttentionPrune,
        RandomPrune,
        ATS,
        TokenPooling,
        ZeroTPrune,
        GTP,
        ALGM,
        MPM,
        VidTLDR,
        ToMe2D,
        DynamicViT,
        AViT,
        AdaViT,
        SPViT,
        TokenLearner,
        DTEM,
        LTMP,
        Drop,
    )
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
    """Return the method that a name, or a name with options, means.

    Raises `UnknownNameError` for a name or an option that does not exist, with the nearest, `ConfigError` for a text
    that is neither.

    >>> parse("tome(metric='x')")
    ToMe(metric='x', heads='mean', distance='cosine', combine='weighted', partition='alternating', seed=0)
    """
    shown = text if len(text) < 200 else f"{text[:200]} ..."
    if "(" not in text:
        return find(shown)()
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise ValueError
        name, names = call.func.id, [part.arg for part in call.keywords]
        if call.args or None in names or len(set(names)) < len(names):
            raise ValueError
        given = {str(part.arg): ast.literal_eval(part.value) for part in call.keywords}
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise ConfigError(
            f"{shown!r} is no method: give a name (`tokenmerge list`), one with options as tome(metric='x'), each "
            "once, by its name and with a plain value, a saved configuration (.json), or a folder that "
            "`tokenmerge train` wrote."
        ) from error
    method = find(name)
    options = [field.name for field in dataclasses.fields(method)]  # type: ignore[arg-type]
    for option in given:
        if option not in options:
            raise unknown_name(f"option of {name}", option, options)
    return method(**given)


def register(method: type[Reduction]) -> type[Reduction]:
    """Add a method from outside the library under its `name` (a class decorator); raises if the name is taken."""
    if method.name in _METHODS:
        raise UnknownNameError(f"method name {method.name!r} is taken by {_METHODS[method.name].__qualname__}.")
    _METHODS[method.name] = method
    return method
