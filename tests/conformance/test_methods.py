"""Every example of every method keeps the promises of `tokenmerge.testing`; what cannot be promised has a reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

import tokenmerge
from helpers import randomised, tiny_vit
from tokenmerge.errors import UnknownNameError
from tokenmerge.methods import (
    LTMP,
    AdaViT,
    AViT,
    DiffRate,
    Drop,
    Reduction,
    TokenLearner,
    ToMe,
    find,
    list_methods,
    register,
)
from tokenmerge.testing import check_method
from tokenmerge.testing.methods import PROMISES

EXAMPLES = [example for name in list_methods() for example in find(name).examples()]
IN_GRAPHS = "graphs"  # takes seconds: see test_method_graphs.py


def without(method: Reduction) -> dict[str, str]:
    """The promises that mean nothing for a method, with the reason."""
    if isinstance(method, Drop):
        return {"padding_first": "the first tokens stay, whatever they are"}
    if isinstance(method, TokenLearner):
        return {"padding_first": "all tokens are means", "leading": "two of its maps may look at one token most"}
    if isinstance(method, ToMe) and method.partition != "alternating":
        return {"padding_first": "padding that lies on the side that absorbs stays"}
    return {}


def prepared(method: Reduction) -> Callable[[Any], Any]:
    """What is done to the fresh modules of a learned method."""
    if isinstance(method, (AViT, LTMP)):
        return lambda modules: modules  # whose few scalars are options
    return opened if isinstance(method, AdaViT) else randomised


def opened(modules: nn.ModuleDict) -> None:
    """An attention of AdaViT that is off adds nothing, also to tokens that stay."""
    for decision in randomised(modules).values():
        decision.sublayers.bias.data.fill_(50.0)  # type: ignore[union-attr]


@pytest.mark.hosts
@pytest.mark.parametrize("promise", [name for name in PROMISES if name != IN_GRAPHS])
@pytest.mark.parametrize("method", EXAMPLES, ids=repr)
def test_a_method_keeps_a_promise(method: Reduction, promise: str) -> None:
    if promise in without(method):
        pytest.skip(without(method)[promise])
    check_method(method, prepare=prepared(method), only=[promise])


@pytest.mark.hosts
def test_a_prune_of_its_own_for_each_block() -> None:
    check_method(DiffRate(prune=(0, 2, 0)), only=["model"])


def test_needs_that_nobody_can_meet_are_refused() -> None:
    class Misspelt(ToMe):
        needs = frozenset({"k", "grid"})

    with pytest.raises(UnknownNameError, match=r"no Misspelt needs 'grid'. Known: q, k, v, class, places"):
        tokenmerge.patch(tiny_vit(), Misspelt(), r=2)


def test_the_registry() -> None:
    names = """
        tome tofu pitome mctf diffrate ppt atm mame greedy tomecis least_loss dsm evit attention random ats
        token_pooling zero_tprune gtp algm mpm vid_tldr tome2d dynamicvit avit adavit spvit tokenlearner dtem ltmp drop
    """
    # others may come between them; docs/methods.md has the same order
    assert [name for name in list_methods() if name in names.split()] == names.split() and find("tome") is ToMe
    with pytest.raises(UnknownNameError, match=r"no method 'tomee'. Did you mean 'tome'\? Known: tome, tofu, pitome"):
        find("tomee")
    with pytest.raises(UnknownNameError, match=r"method name 'tome' is taken by ToMe"):
        register(type("Mine", (ToMe,), {"name": "tome"}))
