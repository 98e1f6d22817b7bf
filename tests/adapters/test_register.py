"""Families from outside the library: registered, used by every door, taken out again, and what is refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokenmerge
from helpers import assert_close, bound_attributes, randomised
from tokenmerge.adapters import ADAPTERS, find, list_adapters, register, unregister
from tokenmerge.adapters.base import Adapter, Binding, BlockSpec, Context, Host, TokenLayout
from tokenmerge.errors import ConfigError, UnknownNameError, UnsupportedModelError
from tokenmerge.measure.simulate import simulate


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.attn = nn.MultiheadAttention(32, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln2(x))


class Outside(nn.Module):
    """A model that no built-in family knows, with a mean over its patches."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 32, 8, 8)
        self.cls = nn.Parameter(torch.zeros(1, 1, 32))
        self.layers = nn.ModuleList(Block() for _ in range(4))
        self.norm, self.head = nn.Identity(), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls.expand(len(x), -1, -1), x), dim=1)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)[:, 1:].mean(dim=1))


class OutsideFamily(Adapter):
    name = "outside"
    families = "models of a test"
    landmarks = ("embed", "layers", "ln1", "attn", "ln2", "mlp")
    host = Host(models=(f"{__name__}.Outside",), blocks="layers", cut_by="embed")
    specs = (BlockSpec(attention=("ln1", "attn"), attn="attn", mlp=("ln2", "mlp")),)

    def layout(self, model: Any) -> TokenLayout:
        return TokenLayout(1, (4, 4), 17, (3, 32, 32))

    def overrides(self, model: Any, context: Context) -> list[Binding]:
        from tokenmerge._intercept.pooling import OutputMean

        return [Binding(model.norm, "forward", OutputMean(model.norm, context.sizes, 1))] if context.sizes else []

    def tiny(self) -> tuple[nn.Module, Tensor]:
        return randomised(Outside()).eval(), torch.randn(2, 3, 32, 32)


@pytest.fixture
def outside() -> Iterator[Adapter]:
    adapter = register(OutsideFamily())
    yield adapter
    if adapter.name in list_adapters():
        unregister(adapter.name)


def test_a_registered_family_is_patched_and_adds_up(outside: Adapter) -> None:
    torch.manual_seed(0)
    model, x = outside.tiny()
    model, x = model.double(), x.double()
    before, expected = bound_attributes(model), model(x)
    handle = tokenmerge.patch(model, r=3, track=True)
    with torch.no_grad():
        merged = model(x)
    report, groups = handle.report(), handle.groups
    assert report.adapter == "outside" and handle.tokens == [14, 11, 8, 5]
    assert "tokens are put back" not in str(report)  # its mean counts each token by its size
    handle.remove()
    assert_close(merged, simulate(model, groups, x), 1e-6)
    assert (merged - expected).abs().max() > 1e-4
    assert torch.equal(model(x), expected) and bound_attributes(model) == before


def test_every_door_knows_it(outside: Adapter) -> None:
    model, _ = outside.tiny()
    assert list_adapters()[0] == "outside" and tokenmerge.list_adapters() == ["outside", *(a.name for a in ADAPTERS)]
    assert find(model) is outside
    assert tokenmerge.supports(model)
    holder = nn.ModuleDict({"vision": model})
    with pytest.raises(UnsupportedModelError, match=r"patch\(model.vision, ...\) instead"):
        tokenmerge.patch(holder, r=3)


def test_it_comes_before_the_built_in_families() -> None:
    class Mine(type(ADAPTERS[0])):  # type: ignore[misc]
        name = "mine"

    model, _ = ADAPTERS[0].tiny()
    assert find(model).name == "timm_vit"
    register(Mine())
    try:
        assert find(model).name == "mine"
    finally:
        unregister("mine")
    assert find(model).name == "timm_vit"


def test_patched_models_keep_a_family_that_was_taken_out(outside: Adapter) -> None:
    model, x = outside.tiny()
    handle = tokenmerge.patch(model, r=3)
    expected = model(x)
    unregister("outside")
    assert torch.equal(model(x), expected) and torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    handle.remove()
    with pytest.raises(UnsupportedModelError, match=r"no adapter for .*Outside"):
        tokenmerge.patch(model, r=3)


class Nameless(OutsideFamily):
    name = None  # type: ignore[assignment]


class Blind(Adapter):
    name, families = "blind", "nothing"
    layout, tiny = OutsideFamily.layout, OutsideFamily.tiny


@pytest.mark.parametrize(
    ("adapter", "error", "text"),
    [
        (
            OutsideFamily(),
            UnknownNameError,
            r"'outside' is taken by the adapter OutsideFamily.*unregister\('outside'\)",
        ),
        (type("Vit", (OutsideFamily,), {"name": "timm_vit"})(), UnknownNameError, r"'timm_vit' is taken by .* TimmViT"),
        (OutsideFamily, ConfigError, r"takes an instance .* given the class OutsideFamily: register\(MyFamily\(\)\)"),
        ("timm_vit", ConfigError, "given a str"),
        (Nameless(), ConfigError, "Nameless does not say its name"),
        (type("Empty", (OutsideFamily,), {"name": ""})(), ConfigError, "Empty does not say its name"),
        (Blind(), ConfigError, r"Blind does not say its matches \(or host.models\)"),
    ],
    ids=["twice", "built-in", "class", "text", "no name", "empty name", "matches nothing"],
)
def test_what_cannot_be_registered(outside: Adapter, adapter: Any, error: type[Exception], text: str) -> None:
    before = list_adapters()
    with pytest.raises(error, match=text):
        register(adapter)
    assert list_adapters() == before


def test_what_was_not_registered_stays(outside: Adapter) -> None:
    with pytest.raises(
        UnknownNameError, match=r"no adapter 'timm_vit' was registered. Registered are: 'outside'; built"
    ):
        unregister("timm_vit")
    assert unregister("outside") is outside
    with pytest.raises(UnknownNameError, match="Registered are: none"):
        unregister("outside")


def test_a_block_that_is_not_described(outside: Adapter) -> None:
    model, _ = outside.tiny()
    model.layers[2].ln1 = None
    del model.layers[2].ln1
    with pytest.raises(
        UnsupportedModelError, match=r"Block with the children \['ln2', .* are not described: outside has"
    ):
        tokenmerge.patch(model, r=3)


def _older(**members: Any) -> type[Adapter]:
    kept = {"layout": OutsideFamily.layout, "tiny": OutsideFamily.tiny, "specs": OutsideFamily.specs}
    base = {"name": "older", "families": "f", "blocks": lambda self, model: [*model.layers.named_children()]}
    return type("Older", (Adapter,), {**base, **kept, "matches": lambda self, m: isinstance(m, Outside), **members})


def test_names_of_older_releases_work_and_warn() -> None:
    from tokenmerge._intercept.pooling import OutputMean

    def head(self: Any, model: Any, sizes: Any) -> Any:
        return [Binding(model.norm, "forward", OutputMean(model.norm, sizes, 1))], []

    def blocks(self: Any, model: Any) -> Any:
        return [(f"layers.{name}", block) for name, block in model.layers.named_children()]

    said = r"Older: cut_by, ignores_rest is said in host now .*"
    with pytest.warns(DeprecationWarning) as warned:
        older = _older(cut_by="embed", ignores_rest=True, head=head, blocks=blocks, hands_out=lambda self, model: "all")
    texts = sorted(str(warning.message) for warning in warned)
    assert [text.split(" is said")[0] for text in texts] == [
        "Older: hands_out",
        "Older: head",
        "Older: ignores_rest, cut_by",
    ], said
    adapter = older()
    model, x = OutsideFamily().tiny()
    assert adapter.host.cut_by == "embed" and adapter.host.ignores_rest
    assert adapter.surroundings(model).handed_out == "all" and adapter.surroundings(model).cutter is model.embed
    register(adapter)
    try:
        with tokenmerge.patched(model, r=3, restore="merged", track=True) as handle, torch.no_grad():
            merged, groups = model(x), handle.groups
        assert_close(merged, simulate(model, groups, x), 1e-6)
    finally:
        unregister("older")
    # asked of an instance
    assert adapter.cut_by == "embed"
    with pytest.warns(DeprecationWarning, match=r"OutsideFamily.followers is host.followers now"):
        assert OutsideFamily().followers == {}
    with pytest.warns(DeprecationWarning, match=r"OutsideFamily.grid_head is surroundings\(model\).last now"):
        assert OutsideFamily().grid_head(model) is None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        OutsideFamily().nothing  # noqa: B018


def test_functions_of_older_adapters_of_timm() -> None:
    from tokenmerge.adapters.timm import vit

    model, _ = ADAPTERS[0].tiny()
    with pytest.warns(DeprecationWarning, match=r"timm_blocks is TimmAdapter\.blocks now"):
        assert vit.timm_blocks(model) == ADAPTERS[0].blocks(model)
    with pytest.warns(DeprecationWarning, match="timm_layout"):
        layout = vit.timm_layout(model, 0)
    assert (layout.prefix, layout.grid, layout.tokens, layout.input_size) == (0, (4, 4), 16, (3, 32, 32))
    model.global_pool = ""
    with pytest.warns(DeprecationWarning, match="timm_tokens"):
        assert vit.timm_tokens(model) == "global_pool='' hands out every token"


@pytest.mark.parametrize(("name", "text"), [("valid", "host.padding"), ("placed", "of the tap"), ("grid_of", "host")])
def test_older_names_that_could_go_wrong_unseen_are_refused(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=f"Older.{name} is not asked any more: say it as .*{text}"):
        _older(**{name: lambda self, *given: None})


def test_an_older_head_on_top_of_overrides_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"has overrides\(\), and head besides"):
        type("Both", (OutsideFamily,), {"head": lambda self, model, sizes: ([], [])})


@pytest.mark.filterwarnings("ignore:.* is said in")
def test_older_methods_reach_those_of_their_bases() -> None:
    model, _ = OutsideFamily().tiny()

    class First(OutsideFamily):
        def looping_parts(self, model: Any) -> Any:
            return [*super().looping_parts(model), model.layers]

        def core(self, model: Any) -> Any:
            return super().core(model)

        def trained_without_merging(self, model: Any) -> Any:
            return super().trained_without_merging(model)

    class Second(First):
        def looping_parts(self, model: Any) -> Any:
            return [*super().looping_parts(model), model.norm]

    found = Second().surroundings(model)
    assert [*found.loops] == [model.layers, model.norm] and [*First().surroundings(model).loops] == [model.layers]
    assert (found.part, found.without_merging) == (model, False)

    class Newer(First):
        def surroundings(self, model: Any) -> Any:
            return replace(super().surroundings(model), last="a head of its own")

    found = Newer().surroundings(model)
    assert [*found.loops] == [model.layers] and found.last == "a head of its own"


@pytest.mark.filterwarnings("ignore:.* is said in")
def test_older_overrides_of_a_class_and_its_subclass() -> None:
    model, _ = OutsideFamily().tiny()
    binding = Binding(model.norm, "forward", model.norm.forward)
    context = Context(lambda: True, lambda x, cut: None, None)
    First = _older(guards=lambda self, model, is_merging: [binding])
    kept = {"finish": lambda self, model, is_merging, restore: [*super(First, self).finish(model, is_merging, restore)]}
    Second = type("Second", (First,), kept)
    for kind in (First, Second):
        assert kind().overrides(model, context) == [binding]
    assert First().overrides(model, replace(context, sizes=None)) == []
    head = {"head": lambda self, model, sizes: ([*super(Second, self).head(model, sizes)[0], binding], [])}
    assert type("Third", (Second,), head)().overrides(model, context) == [binding, binding]


def test_older_names_of_mixins_of_instances_and_set_later() -> None:
    model, _ = OutsideFamily().tiny()

    class Mixin:
        cut_by = "stem"

        def hands_out(self, model: Any) -> str:
            return "all"

    with pytest.warns(DeprecationWarning, match="is said in"):
        mixed: Any = type("Mixed", (Mixin, OutsideFamily), {})
    assert mixed.host.cut_by == "stem" and mixed().surroundings(model).handed_out == "all"

    class Later(OutsideFamily):
        name = "later"

    Later.hands_out = lambda self, model: "all"  # type: ignore[attr-defined]
    Later.cut_by = "stem"  # type: ignore[attr-defined]
    with pytest.warns(DeprecationWarning, match="Later: (cut_by|hands_out) is said in"):
        register(Later())
    unregister("later")
    assert Later.host.cut_by == "stem" and Later().surroundings(model).handed_out == "all"

    class Itself(OutsideFamily):
        def __init__(self, **members: Any) -> None:
            for name, value in members.items():
                setattr(self, name, value)

    with pytest.warns(DeprecationWarning, match="Itself.cut_by is host.cut_by now"):
        assert Itself(cut_by="stem").host.cut_by == "stem" and OutsideFamily.host.cut_by != "stem"
    for name, text in (
        ("hands_out", r"surroundings\(model\).handed_out"),
        ("head", "part of overrides"),
        ("valid", "host"),
    ):
        with pytest.raises(ConfigError, match=rf"Itself: {name} was set on an instance.*{text}"):
            Itself(**{name: lambda *given: None})
    with pytest.raises(ConfigError, match=r"Mixed2\.placed is not asked any more"):
        type("Mixed2", (type("Odd", (), {"placed": None}), OutsideFamily), {})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *((name, r"part of overrides\(model, context\)") for name in ("head", "guards", "finish")),
        ("core", r"surroundings\(model\).adapter"),
        ("trained_without_merging", r"surroundings\(model\).without_merging"),
        ("valid", "host.padding"),
        ("pooling_parts", r"surroundings\(model\).part"),
    ],
)
def test_older_names_that_nothing_answers_to_name_their_successor(name: str, text: str) -> None:
    with pytest.raises(AttributeError, match=rf"OutsideFamily.{name} is not asked any more: it is {text}"):
        getattr(OutsideFamily(), name)
    assert not hasattr(OutsideFamily(), name)
