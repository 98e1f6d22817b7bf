"""Bindings on plain modules: in place, in order, taken out again to the last attribute."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from tokenmerge._intercept.bindings import bind, is_bound, notes, undo
from tokenmerge._intercept.override import Binding, ChildOverride, Override
from tokenmerge.errors import UnsupportedError


class Doubled(Override):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * self.original(*args, **kwargs)


class Shifted(Override):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.original(*args, **kwargs) + 1


X = torch.arange(3.0)


def test_overrides_stand_one_on_top_of_the_other_in_the_order_they_are_bound() -> None:
    module = nn.Identity()
    both = [Doubled(module), Shifted(module)]  # made before the first is bound
    for value in both:
        bind(Binding(module, "forward", value))
    assert torch.equal(module(X), 2 * X + 1) and len(notes(module)) == 2
    undo([module])
    assert torch.equal(module(X), X) and not is_bound(module) and vars(module) == vars(nn.Identity())


def test_an_attribute_of_the_instance_comes_back() -> None:
    module = nn.Identity()
    own = module.__dict__["forward"] = lambda x: -x
    bind(Binding(module, "forward", Doubled(module)))
    bind(Binding(module, "speed", 3))
    assert torch.equal(module(X), -2 * X) and module.speed == 3
    undo([module])
    assert module.__dict__["forward"] is own and "speed" not in vars(module)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_is_bound_and_undone_by_itself(how: Any) -> None:
    module = nn.Linear(3, 3)
    bind(Binding(module, "forward", Doubled(module)))
    twin = how(module)
    with torch.no_grad():
        twin.weight.mul_(-1)
        expected = 2 * nn.functional.linear(X, twin.weight, twin.bias)
        assert torch.equal(twin(X), expected), "the copy's override runs the copy's weights"
    undo([twin])
    assert is_bound(module) and not is_bound(twin)


def test_what_others_put_on_top_stays_and_is_told() -> None:
    module = nn.Identity()
    override = Doubled(module)
    bind(Binding(module, "forward", override))

    def wrapper(x: torch.Tensor) -> torch.Tensor:
        return override(x) + 100

    module.__dict__["forward"] = wrapper
    with pytest.warns(UserWarning, match=r"forward of a Identity was replaced by .*wrapper after"):
        undo([module])
    assert module.__dict__["forward"] is wrapper and not is_bound(module)


def test_a_child_that_was_wrapped_is_followed_and_another_one_is_not() -> None:
    parent = nn.Sequential(nn.Identity())
    override = ChildOverride(parent, "0")
    override.follow()
    parent[0] = nn.Sequential(override.owner)
    override.follow()
    assert override.around is parent[0]
    parent[0] = nn.Identity()
    with pytest.raises(UnsupportedError, match="'0' of a Sequential was replaced"):
        override.follow()


def test_arguments_are_known_by_their_names() -> None:
    override = Override(nn.Identity())
    override.names = ["mask", "scale"]
    assert override.by_name((1,), {"scale": 2}) == {"mask": 1, "scale": 2}
    assert override.by_name((), {}) == {}
