"""`handle.trace()`: the pairs rebuild the groups, similarities are those of the features, and results do not change."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokenmerge
from helpers import answer, assert_close, randomised, replayed, tiny_vit
from tokenmerge.errors import ConfigError, NotTrackedError
from tokenmerge.methods import NEW
from tokenmerge.report.trace import Merge

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def _vit() -> nn.Module:
    torch.manual_seed(0)
    return randomised(tiny_vit()).eval()


def _hf() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=32,
        patch_size=4,
        num_labels=10,
    )
    torch.manual_seed(0)
    return randomised(transformers.ViTForImageClassification(config)).eval()


def _traced(model: nn.Module, method: Any = "tome", **options: Any) -> tuple[Tensor, Any, list[Tensor]]:
    """The answer, the trace and the groups of a forward."""
    with tokenmerge.patched(model, method, **{"r": 3, "track": "pairs", **options}) as handle, torch.no_grad():
        return answer(model(X)), handle.trace(), handle.groups


@pytest.mark.parametrize("make", [_vit, _hf], ids=["timm", "transformers"])
@pytest.mark.parametrize(
    "method",
    ["tome", "tome(heads='concat')", "pitome", "mctf", "token_pooling", "evit", "ppt", "random", "vid_tldr", "drop"],
)
def test_the_pairs_rebuild_the_groups_and_change_nothing(make: Any, method: str) -> None:
    model = make()
    out, trace, groups = _traced(model, method)
    assert torch.equal(out, _plain(model, method))
    by_pairs, by_groups = replayed(trace)
    assert len(by_pairs) == len(groups) and all(map(torch.equal, by_pairs, by_groups))
    assert all(map(torch.equal, [block.groups for block in trace.blocks], groups))
    assert not any(block.is_mixed for block in trace.blocks)
    assert all(block.gone.shape == block.into.shape == block.similarity.shape == (2, 3) for block in trace.blocks)
    for block in trace.blocks:
        assert torch.equal(block.into < 0, block.similarity.isnan())
        assert ((block.similarity <= 1 + 1e-5) & (block.similarity >= -1 - 1e-5))[block.into >= 0].all()


def _plain(model: nn.Module, method: str) -> Tensor:
    with tokenmerge.patched(model, method, r=3) as handle, torch.no_grad():
        out = answer(model(X))
        with pytest.raises(NotTrackedError, match='track="pairs"'):
            handle.trace()
        return out


def _keys(model: nn.Module) -> list[tuple[nn.Module, Any]]:
    """For every block, the layer that makes its keys, and how to read them: `[B, N, H, D]`."""
    if hasattr(model, "blocks"):
        return [(block.attn.qkv, lambda out: out.unflatten(2, (3, 4, -1))[:, :, 1]) for block in model.blocks]  # type: ignore[union-attr]
    attentions = [module for module in model.modules() if hasattr(module, "k_proj") or hasattr(module, "key")]
    layers = [getattr(module, "k_proj", None) or module.key for module in attentions]
    return [(layer, lambda out: out.unflatten(2, (4, -1))) for layer in layers]


@pytest.mark.parametrize("make", [_vit, _hf], ids=["timm", "transformers"])
@pytest.mark.parametrize("heads", ["mean", "concat"])
def test_similarities_are_cosines_of_the_keys(make: Any, heads: str) -> None:
    model, seen = make(), list[Tensor]()
    with tokenmerge.patched(model, f"tome(heads='{heads}')", r=3, track="pairs") as handle, torch.no_grad():
        hooks = [
            layer.register_forward_hook(lambda _, __, out, read=read: seen.append(read(out)))
            for layer, read in _keys(model)
        ]
        model(X)
        trace = handle.trace()
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(trace.blocks) >= 3
    before = torch.arange(trace.blocks[0].groups.shape[1]).expand(2, -1)
    for keys, block in zip(seen, trace.blocks, strict=True):
        rows = keys.mean(dim=2) if heads == "mean" else keys.flatten(2)
        for image in range(2):
            at = {place: slot for slot, place in enumerate(before[image].tolist())}
            for gone, into, similarity in zip(
                *(part[image].tolist() for part in (block.gone, block.into, block.similarity)), strict=True
            ):
                a, b = rows[image, at[gone]], rows[image, at[into]]
                assert abs(float(torch.cosine_similarity(a, b, dim=0)) - similarity) < 1e-5
        before = block.kept


def test_a_genealogy_by_hand() -> None:
    _, trace, groups = _traced(_vit(), r=8)
    for place in (0, 1, 17, 40, 64):
        members = (groups[-1][1] == groups[-1][1, place]).nonzero().flatten().tolist()
        steps = trace.genealogy(place, image=1)
        assert sorted(step.gone for step in steps) == [
            m for m in members if m != trace.blocks[-1].kept[1][groups[-1][1, place]]
        ]
        assert [step.block for step in steps] == sorted(step.block for step in steps)
        assert all({step.gone, step.into} <= set(members) for step in steps)
    assert any(trace.genealogy(place, image=1) for place in range(65)) and trace.genealogy(0) == []


def test_what_was_dropped_has_no_partner() -> None:
    _, trace, groups = _traced(_vit(), "attention")
    dropped = (groups[-1][0] < 0).nonzero().flatten().tolist()
    steps = [trace.genealogy(place) for place in dropped]
    assert len(dropped) == 3 * len(trace.blocks) and all(len(one) == 1 and one[0].into == -1 for one in steps)
    assert sorted(one[0].gone for one in steps) == dropped and steps[0][0].similarity != steps[0][0].similarity
    assert isinstance(steps[0][0], Merge)


def test_mixtures_have_groups_and_no_pairs() -> None:
    model = _vit()
    method = tokenmerge.methods.find("tokenlearner")(weights=NEW)  # type: ignore[call-arg]
    _, trace, groups = _traced(model, method, r=[0, 8, 0, 0])
    assert [block.is_mixed for block in trace.blocks].count(True) == 1
    assert all(block.gone.shape == (2, 0) for block in trace.blocks)
    assert all(map(torch.equal, [block.groups for block in trace.blocks], groups))


@pytest.mark.parametrize("options", [{"restore": "dense"}, {"multiple_of": 4, "r": [4, 8, 2, 4]}], ids=str)
def test_other_ways_of_merging(options: dict[str, Any]) -> None:
    _, trace, _ = _traced(_vit(), **options)
    assert all(map(torch.equal, *replayed(trace))) and trace.blocks[-1].gone.numel()


def test_blocks_by_name_have_pairs() -> None:
    out, trace, _ = _traced(_vit(), blocks="blocks", attn="attn", norm="norm2", mlp="mlp", prefix=1)
    same, other, _ = _traced(_vit())
    assert_close(out, same, 1e-5)
    for one, two in zip(trace.blocks, other.blocks, strict=True):
        assert torch.equal(one.gone, two.gone) and torch.equal(one.into, two.into)
        assert_close(one.similarity, two.similarity, 1e-5)


def test_json_holds_all_of_it() -> None:
    _, trace, groups = _traced(_vit(), "attention")
    content = json.loads(trace.to_json(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert content["prefix"] == 1 and content["grid"] == list(trace.grid or ()) and "Attention" in content["method"]
    assert content["blocks"][-1]["groups"] == groups[-1].tolist()
    assert content["blocks"][0]["similarity"] == [[None] * 3] * 2 and content["blocks"][0]["is_mixed"] is False


def test_what_was_not_recorded_is_refused() -> None:
    model = _vit()
    handle = tokenmerge.patch(model, r=3, track="pairs")
    with pytest.raises(NotTrackedError, match="no forward has run"):
        handle.trace()
    handle.track = True
    model(X)
    with pytest.raises(NotTrackedError, match="only with patch"):
        handle.trace()
    assert len(handle.groups) > 0
    handle.track = "pairs"
    with pytest.raises(NotTrackedError, match="before pairs were tracked"):
        handle.trace()
    model(X)
    assert handle.trace().blocks[0].gone.shape == (2, 3) and handle.config.track == "pairs"
    with pytest.raises((ConfigError, TypeError)):
        tokenmerge.patch(_vit(), r=3, track="pair")  # type: ignore[typeddict-item]


def test_nothing_is_recorded_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenmerge._runtime import residual

    monkeypatch.setattr(residual, "pair_cosines", lambda *_: pytest.fail("similarities cost time"))
    model = _vit()
    for track in (False, True):
        with tokenmerge.patched(model, r=3, track=track):
            model(X)


def test_a_compiled_forward_is_traced_as_an_eager_one() -> None:
    model = _vit()
    _, expected, _ = _traced(model)
    torch._dynamo.reset()
    with tokenmerge.patched(model, r=3, track="pairs") as handle, torch.no_grad():
        torch.compile(model, fullgraph=True, backend="eager")(X)
        trace = handle.trace()
    for one, two in zip(trace.blocks, expected.blocks, strict=True):
        assert torch.equal(one.gone, two.gone) and torch.equal(one.into, two.into)
        assert_close(one.similarity, two.similarity, 1e-5)


def test_an_exported_forward_is_not_traced() -> None:
    model = _vit()
    with tokenmerge.patched(model, r=3, track="pairs") as handle, torch.no_grad():
        program = torch.export.export(model, (X,))
        program.module()(X)
        with pytest.raises(NotTrackedError, match="no forward has run"):
            handle.trace()
        model(X)
        assert len(handle.trace().blocks) > 0
