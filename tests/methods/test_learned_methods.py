"""Methods with modules of their own: what training hides is what inference removes, and weights are found again."""

from __future__ import annotations

import copy
import json
import math
import pickle
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import third_opinion
import tokenmerge
from helpers import assert_close, bound_attributes, randomised, tiny_vit
from tokenmerge import assets, matching
from tokenmerge.errors import ConfigError, UnsupportedError
from tokenmerge.methods import DTEM, LTMP, AdaViT, AViT, DynamicViT, Learned, SPViT, TokenLearner, avit, learned
from tokenmerge.methods.base import ModelShape, TokenView
from tokenmerge.methods.dtem import soft_matching

pytestmark = pytest.mark.hosts
METHODS = [
    DynamicViT("new"),
    AViT("new", gamma=2.0, beta=0.0),
    AdaViT("new"),
    SPViT("new"),
    TokenLearner("new", hidden=16),
    DTEM("new", width=16),
    LTMP("new", merge_at=0.96, prune_at=0.003),
]
R = [8, 0, 6, 4]
MASKING = [method for method in METHODS if not isinstance(method, (TokenLearner, DTEM))]
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
every_masking = pytest.mark.parametrize("method", MASKING, ids=lambda method: method.name)
IMAGES = (2, 3, 32, 32)
TRAINED = sorted((Path(__file__).parents[2] / "benchmarks" / "models" / "learned").glob("*/merge.json"))


def _patched(method: Learned, r: Any = R, **options: Any) -> tuple[nn.Module, tokenmerge.Handle]:
    model = tiny_vit(**options)
    handle = tokenmerge.patch(model, method, r=r)
    if not isinstance(method, (AViT, LTMP)):
        randomised(model.tokenmerge_modules)
    if isinstance(method, AdaViT):
        for decision in model.tokenmerge_modules.values():
            # some patches off, sublayers mostly on
            decision.norm.bias.data.zero_(), decision.norm.weight.data.fill_(1.0)
            decision.patch.bias.data.fill_(0.5), decision.sublayers.bias.data.fill_(5.0)
    return model, handle


def _memory(handle: tokenmerge.Handle) -> dict[int, Any]:
    return handle._last().memory


def _notes(handle: tokenmerge.Handle, kind: type[Any]) -> list[Any]:
    return learned.notes_of(_memory(handle), kind)


def _hard(logit: Tensor, temperature: float = 1.0) -> Tensor:
    """Stands for the random draw: ones where the logit is not negative."""
    return learned.straight_through((logit >= 0).float(), logit.sigmoid())


def _upper(logit: Tensor, temperature: float = 1.0) -> Tensor:
    """Stands for the random draw: ones for the upper 70 of 100 logits."""
    border = logit.quantile(0.3, dim=1, keepdim=True)
    return learned.straight_through((logit >= border).float(), logit.sigmoid())


def _view(B: int = 2, N: int = 17, prefix: int = 1, **given: Any) -> TokenView:
    q, k, v = (torch.randn(B, 3, N, 8) for _ in range(3))
    size = torch.randint(1, 5, (B, N)).float()
    x, x_pre = torch.randn(B, N, 24), torch.randn(B, N, 24)
    view = TokenView(x, x_pre, q, k, v, size, prefix, None, layer=1, depth=3, bias=size.log(), memory={})
    return replace(view, **given)


def _with_module(method: Learned, view: TokenView, r: int) -> TokenView:
    n = view.stream.shape[1]
    shape = ModelShape(24, 3, view.prefix, view.prefix > 0, (0, r, 0), (n, n, n - r), (1,))
    modules = method.build(shape)
    assert modules is not None
    if not isinstance(method, (AViT, LTMP)):
        randomised(modules)
    return replace(view, module=modules.eval()["1"])


@every_method
def test_it_needs_weights_and_says_how_to_get_them(method: Learned) -> None:
    with pytest.raises(UnsupportedError, match=rf"{method.name} is learned and has no weights.*weights='new'"):
        tokenmerge.patch(tiny_vit(), type(method)(), r=R)
    with pytest.raises(UnsupportedError, match="has no weights"):
        tokenmerge.patch(tiny_vit(), method.name, r=R)


@every_method
def test_weights_travel(method: Learned, tmp_path: Path) -> None:
    model, handle = _patched(method)
    x = torch.randn(IMAGES)
    expected = model(x)
    handle.save(tmp_path / "merge.json")
    fresh = tiny_vit()
    handle.remove()
    fresh.load_state_dict(model.state_dict())
    config = tokenmerge.MergeConfig.load(tmp_path / "merge.json")
    assert config.method == replace(method, weights=str(tmp_path / "merge.safetensors")) and config.r == R
    again = tokenmerge.patch(fresh, config)
    assert torch.equal(fresh(x), expected)
    again.remove()
    other = tiny_vit() if isinstance(method, (AViT, LTMP)) else tiny_vit(embed_dim=64)
    with pytest.raises(ConfigError, match=rf"the weights of {method.name} in .* are of another model or r: .*\("):
        tokenmerge.patch(other, config, r=[8, 7] if isinstance(method, (AViT, LTMP)) else R)
    assert not bound_attributes(other) and "tokenmerge_modules" not in dict(other.named_children())


@pytest.mark.parametrize("path", TRAINED, ids=lambda path: path.parent.name)
def test_what_was_trained_is_as_good_as_its_log_says(path: Path) -> None:
    from safetensors.torch import load_file

    model, weights = assets.reference_model(), path.with_name("model.safetensors")
    if weights.exists():
        model.load_state_dict(load_file(weights))
    handle = tokenmerge.patch(model, tokenmerge.MergeConfig.load(path))
    rows = map(json.loads, path.with_name("metrics.jsonl").read_text(encoding="utf-8").splitlines())
    (logged,) = (row for row in rows if row["split"] == "test" and row["r"] != 0)
    images, labels = assets.fashion_mnist("test")
    images = (images[:100, None].float() / 255 - assets.MEAN) / assets.STD
    right, tokens = 0, []
    with torch.inference_mode():
        # as many as in the last batch of 500, where their number counts for what is removed
        for batch, answers in zip(images.split(20), labels[:100].split(20), strict=True):
            right += int((model(batch).argmax(-1) == answers).sum())
            tokens.append(sum(handle.tokens) / 12)
    assert logged["tokens"] < 197
    assert right / 100 > logged["accuracy"] - 0.08
    assert np.mean(tokens) == pytest.approx(logged["tokens"], rel=0.1 if handle.config.method.is_adaptive else 1e-9)


@every_method
def test_the_model_holds_its_modules_and_gives_them_back(method: Learned) -> None:
    plain = tiny_vit()
    keys, x = set(plain.state_dict()), torch.randn(IMAGES)
    expected = plain(x)
    model = copy.deepcopy(plain)
    handle = tokenmerge.patch(model, method, r=R)
    extra = set(model.state_dict()) - keys
    assert extra and all(key.startswith("tokenmerge_modules.") for key in extra) and keys <= set(model.state_dict())
    reduced = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), reduced)
        runners = tokenmerge.handle_of(twin).runners
        assert runners[0].module is twin.tokenmerge_modules["0"]
    with handle.disabled():
        assert torch.equal(model(x), expected)
    handle.remove()
    assert not bound_attributes(model) and set(model.state_dict()) == keys
    assert "tokenmerge_modules" not in dict(model.named_modules()) and torch.equal(model(x), expected)


@every_method
def test_nothing_to_remove_is_the_original_model(method: Learned) -> None:
    model, handle = _patched(method)
    x = torch.randn(IMAGES)
    with handle.disabled():
        expected = model(x)
    before, handle.r = handle.r, 0
    for training in (False, True):
        model.train(training)
        assert torch.equal(model(x), expected)
    if method.adds_loss:
        assert handle.loss() == 0
        handle.r = before
        model.eval()(x)
        with pytest.raises(UnsupportedError, match="noted nothing for the loss"):
            handle.loss()
    else:
        with pytest.raises(UnsupportedError, match="adds nothing to the loss"):
            handle.loss()


@every_method
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_modes_gradients_and_compilation(method: Learned, pool: str) -> None:
    if pool == "avg" and isinstance(method, AViT):
        with pytest.raises(UnsupportedError, match="class token"):
            _patched(method, global_pool="avg", class_token=False)
        return
    options = {} if pool == "token" else {"global_pool": "avg", "class_token": False}
    model, handle = _patched(method, r=[8, 0, 6], depth=3, **options)
    x, removes = torch.randn(IMAGES), isinstance(method, (TokenLearner, DTEM))
    n = 64 + handle.prefix
    reduced = model(x)
    assert torch.equal(model(x), reduced)
    assert handle.tokens == [n - 8, n - 8, n - 14] or method.is_adaptive
    model.train()
    model(x)
    assert handle.tokens == ([n - 8, n - 8, n - 14] if removes else [n] * 3)
    loss = model(x).square().sum() + (0 if removes else handle.loss())
    loss.backward()
    assert loss.isfinite()
    names = [name for name, p in model.tokenmerge_modules["0"].named_parameters() if not p.grad.abs().sum() > 0]
    # what every map of TokenLearner gets alike, its softmax takes out
    assert not names or isinstance(method, TokenLearner), names
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.blocks[0].attn.qkv.weight.grad.abs().sum() > 0
    model.eval()
    assert torch.equal(model(x), reduced)
    if pool == "token":
        return  # tests/conformance/test_method_graphs.py captures these
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)(x)
    if not method.is_adaptive:
        assert_close(compiled, reduced)
    assert handle.tokens == [n - 8, n - 8, n - 14]


@every_method
def test_half_precision(method: Learned) -> None:
    model, handle = _patched(method)
    model.bfloat16()
    x = torch.randn(IMAGES, dtype=torch.bfloat16)
    assert model(x).isfinite().all() and handle.tokens[-1] <= 65
    model.train()
    model(x).float().square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


# --- masks


@every_masking
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_what_training_masks_inference_removes(method: Learned, pool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One image, no noise: the answer with masks is the answer without the tokens, over several layers."""
    if pool == "avg" and isinstance(method, AViT):
        pytest.skip("needs a class token")
    for module, draw in (("dynamicvit", _upper), ("adavit", _hard), ("spvit", _upper)):
        monkeypatch.setattr(f"tokenmerge.methods.{module}.gumbel_sigmoid", draw)
    options = {} if pool == "token" else {"global_pool": "avg", "class_token": False}
    x = torch.randn(1, 3, 32, 32)
    model, handle = _patched(method, r=[25, 0, 15, 10], **options)
    model.train()
    with torch.no_grad():
        if isinstance(method, AdaViT):
            _balance(model, x)
        masked = model(x)
    counts = [int(note.share.sum()) for note in _notes(handle, learned.MaskNote)]
    removed = [before - after for before, after in zip([64, *counts[:-1]], counts, strict=True)]
    assert len(counts) == 3 and removed[0] > 0 and removed[1] > 0 and counts[-1] > 0, counts
    # nothing is capped by r then
    handle.r = [removed[0], 0, removed[1], removed[2]]
    model.eval()
    with torch.no_grad():
        got = model(x)
        assert_close(got, masked, 1e-4)
    n = handle.prefix
    assert handle.tokens == [counts[0] + n, counts[0] + n, counts[1] + n, counts[2] + n]


def _balance(model: nn.Module, x: Tensor) -> None:
    """Shift AdaViT's decisions so that three of ten patches go at each layer."""
    for decision in model.tokenmerge_modules.values():
        seen: list[Tensor] = []
        hook = decision.register_forward_hook(lambda module, args, out, seen=seen: seen.extend((args[1], out[0])))
        model(x)
        hook.remove()
        decision.patch.bias.data -= seen[1][seen[0] > 0.5].quantile(0.3)


def test_a_masked_token_stays_masked_and_shares_multiply() -> None:
    method = DynamicViT("new")
    torch.manual_seed(3)
    model, handle = _patched(method)
    model.train()
    model(torch.randn(IMAGES))
    notes = _notes(handle, learned.BudgetNote)
    for before, after in pairwise(notes):
        assert (after.share <= before.share).all()
    # 64 patches; r 8, 6, 4 fall one after the other although no token has really gone
    assert [note.target for note in notes] == [56 / 64, 50 / 64, 46 / 64]
    for note in notes:
        assert set(note.share.unique().tolist()) <= {0.0, 1.0} and note.share[:, 0].sum() == 0
        assert_close(note.ratio, note.share[:, 1:].mean(dim=1))
    expected = 2.0 * sum((n.ratio - n.target).square().mean() for n in notes) / 3
    assert_close(handle.loss(), expected)
    size = handle.sizes
    assert torch.equal(size > 0.5, torch.cat((torch.ones(2, 1, dtype=torch.bool), notes[-1].share[:, 1:] > 0.5), 1))
    assert (size >= 0.9e-6).all()


def test_masks_need_the_attention_to_see_sizes() -> None:
    model = tiny_vit()
    tokenmerge.patch(model, DynamicViT("new"), r=R, prop_attn=False)
    model(torch.randn(IMAGES))
    with pytest.raises(UnsupportedError, match="train with prop_attn=True"):
        model.train()(torch.randn(IMAGES))


def test_masked_values_keep_their_gradients() -> None:
    mask = torch.tensor([[1.0, 0.0, 0.3]], requires_grad=True)
    plan = learned.MaskedPlan.of(mask)
    assert plan.mask is not None
    assert_close(plan.mask, torch.tensor([[1.0, 1e-6, 0.3]]), 1e-9)
    plan.mask.sum().backward()
    assert mask.grad is not None and mask.grad.tolist() == [[1.0, 1.0, 1.0]]
    # sigmoid(0.7)
    assert float(learned.gumbel_sigmoid(torch.full((20000,), 0.7)).mean()) == pytest.approx(0.668, abs=0.01)


def test_checkpointed_blocks_give_the_same_gradients() -> None:
    x = torch.randn(IMAGES)
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model, handle = _patched(DynamicViT("new"))
        model.train().set_grad_checkpointing(checkpointed)
        torch.manual_seed(1)
        (model(x).square().sum() + handle.loss()).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in found[0].items():
        assert_close(found[1][name], gradient, 1e-4)


# --- each method by itself


def test_prune_against_loops() -> None:
    score = torch.randn(3, 12).round(decimals=1)
    for prefix in (0, 1, 3):
        keep = matching.prune(score, 4, prefix=prefix).keep.tolist()
        for image in range(3):
            order = sorted(range(prefix, 12), key=lambda i: (-float(score[image, i]), i))
            assert keep[image] == list(range(prefix)) + sorted(order[: 12 - prefix - 4])


def test_dynamicvit_keeps_the_best_by_its_predictor() -> None:
    method = DynamicViT("new")
    view = _with_module(method, _view(), 6)
    assert view.module is not None
    x, layers = view.x[:, 1:], view.module
    local, whole = layers.embed(x).chunk(2, dim=-1)
    score = layers.decide(torch.cat((local, whole.mean(1, keepdim=True).expand_as(local)), -1))[..., 0].detach()
    for image in range(2):
        best = sorted(range(16), key=lambda i: -float(score[image, i]))[:10]
        assert method.plan(view, 6).keep[image].tolist() == [0, *sorted(i + 1 for i in best)]


def test_spvit_packs_what_it_drops() -> None:
    method = SPViT("new", heads=3)
    view = _with_module(method, _view(), 5)
    assert view.module is not None and view.size is not None
    share = torch.ones(2, 17)
    share[:, 0] = 0
    score = view.module(view.x, share).sigmoid().detach()
    x, size = method.merge(method.plan(view, 5), view.x, view.size)
    assert size is not None
    for image in range(2):
        order = sorted(range(1, 17), key=lambda i: -float(score[image, i]))
        kept, gone = order[:10], order[10:]  # six are dropped, one comes back
        places = [0, *sorted([*kept, gone[0]])]
        slot = places.index(gone[0])
        package = sum(score[image, i] * view.x[image, i] for i in gone) / sum(score[image, i] for i in gone)
        assert_close(x[image, slot], package)
        assert size[image, slot] == sum(view.size[image, i] for i in gone)
        others = [at for at in range(12) if at != slot]
        assert_close(x[image, others], view.x[image, [places[at] for at in others]])
    with pytest.raises(ConfigError, match="5 heads, which do not divide the model's width 32"):
        tokenmerge.patch(tiny_vit(), SPViT("new", heads=5), r=R)


def test_tokenlearner_pools_by_its_maps() -> None:
    method = TokenLearner("new", hidden=8)
    view = _with_module(method, _view(prefix=2), 11)
    plan = method.plan(view, 11)
    assert view.module is not None and view.size is not None and plan.weight.shape == (2, 6, 17)
    assert_close(plan.weight.sum(dim=2), torch.ones(2, 6))
    x, size = method.merge(plan, view.x, view.size)
    maps = view.module.layers(view.x[:, 2:]).softmax(dim=1).detach()  # [B, N - 2, 4]
    for image in range(2):
        assert torch.equal(x[image, :2], view.x[image, :2])
        for s in range(4):
            weight = maps[image, :, s] * view.size[image, 2:]
            expected = sum(float(weight[i]) * view.x[image, 2 + i] for i in range(15)) / float(weight.sum())
            assert_close(x[image, 2 + s], expected)
    assert size is not None
    assert_close(size.sum(dim=1), view.size.sum(dim=1))


def test_tokenlearner_is_made_for_one_number_of_tokens() -> None:
    model, handle = _patched(TokenLearner("new"), r=[0, 48])
    model(torch.randn(IMAGES))
    assert handle.tokens == [65, 17, 17, 17]
    handle.r = [0, 40]
    with pytest.raises(UnsupportedError, match="has 16 maps at block 1 and is to leave 24 of 64 tokens"):
        model(torch.randn(IMAGES))
    handle.r = [48]
    with pytest.raises(UnsupportedError, match="no module for block 0"):
        model(torch.randn(IMAGES))
    with pytest.raises(UnsupportedError, match="does not say how many tokens"):
        TokenLearner("new").build(ModelShape(24, 3, 1, True, None, None, (1,)))


def test_dtem_is_bipartite_matching_on_its_embedding() -> None:
    method = DTEM("new", width=8)
    view = _with_module(method, _view(), 5)
    assert view.module is not None and view.size is not None
    x_pre = view.x_pre.double()
    metric = (x_pre - x_pre.mean(-1, keepdim=True)) / (x_pre.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    metric = metric @ view.module.weight.double().T + view.module.bias.double()  # type: ignore[union-attr, operator]
    x, size = method.merge(method.plan(view, 5), view.x, view.size)
    for image in range(2):
        groups = third_opinion.bipartite(metric[image].detach().numpy(), 5, 1)
        mean, total = third_opinion.weighted_mean(
            view.x[image].double().numpy(), view.size[image].double().numpy(), groups
        )
        assert_close(x[image].double(), torch.from_numpy(mean), 1e-5)
        assert size is not None and size[image].tolist() == total.tolist()


def test_dtem_matches_softly_and_in_the_limit_hard() -> None:
    view = _with_module(DTEM("new", width=8), _view(), 5)
    assert view.module is not None
    hard_x, hard_size = DTEM("new").merge(DTEM("new").plan(view, 5), view.x, view.size)
    view.module.train()
    differences = []
    for temperature in (0.3, 0.1, 0.01, 1e-4):
        method = DTEM("new", temperature=temperature)
        plan = method.plan(view, 5)
        x, size = method.merge(plan, view.x, view.size)
        assert x.shape == hard_x.shape and size is not None and hard_size is not None and view.size is not None
        assert torch.equal(plan.keep, DTEM("new").plan(replace(view, module=view.module.eval()), 5).keep)
        view.module.train()
        assert_close(size.sum(dim=1), view.size.sum(dim=1))
        assert_close(x[:, 0], view.x[:, 0])
        differences.append(((x - hard_x).abs().max() + (size - hard_size).abs().max()).item())
    assert differences == sorted(differences, reverse=True) and differences[-1] < 1e-4 < differences[0]


def test_soft_matching_against_loops() -> None:
    scores = torch.rand(2, 4, 5).double()
    given = soft_matching(scores, 3, 0.1, 2)
    for image in range(2):
        row_given = np.zeros((4, 5))
        for _ in range(3):
            weight = np.zeros((4, 5))
            for i in range(4):
                for j in sorted(range(5), key=lambda j: -float(scores[image, i, j]))[:2]:
                    free = max(1 - row_given[i].sum(), 1e-6)
                    weight[i, j] = math.exp((float(scores[image, i, j]) + math.log(free)) / 0.1)
            row_given += weight / weight.sum()
            for i in range(4):
                row_given[i] /= max(1.0, row_given[i].sum())
        assert_close(given[image], torch.from_numpy(row_given), 1e-9)


def test_avit_that_never_halts_is_the_original_model() -> None:
    """Of the mean over the class token's states all the weight lies on the last one."""
    model, handle = _patched(AViT("new", gamma=0.0, beta=-40.0))
    x = torch.randn(IMAGES)
    with handle.disabled():
        expected = model(x)
    for training in (False, True):
        assert_close(model.train(training)(x), expected)
        assert handle.tokens == [65] * 4
    # every token ran in all three scoring blocks, and all of one was missing at the last
    last = _memory(handle)[3]
    assert_close((last.steps + last.remainder)[:, 1:], torch.full((2, 64), 4.0))


def test_avit_collects_scores_and_mixes_class_tokens() -> None:
    method, memory = AViT("new", gamma=1.0, beta=-1.0), {}
    built = method.build(ModelShape(24, 3, 1, True, None, None, (0, 1, 2)))
    assert built is not None and built["0"] is built["2"]
    built.train()
    states, scores = torch.randn(3, 2, 9, 24), []
    for layer in range(3):
        view = replace(_view(2, 9), stream=states[layer], layer=layer, module=built[str(layer)], memory=memory)
        mask = method.plan(view, 3).mask  # type: ignore[union-attr]
        scores.append(1 / (1 + np.exp(-(states[layer, :, :, 0].double().numpy() - 1))))
        out = method.after_mlp(states[layer] + layer, states[layer], layer, 3, memory)
        for image in range(2):
            for token in range(1, 9):
                total = 0.0
                for score in scores:
                    total += score[image, token]
                gone_before = sum(score[image, token] for score in scores[:-1]) >= 0.99
                # what is gone already is not masked again: sizes multiply
                assert bool(mask[image, token] < 0.5) == (total >= 0.99 and not gone_before)
    for image in range(2):
        expected, spent = np.zeros(24), 0.0
        for layer in range(3):
            score = scores[layer][image, 0]
            step = 0.0 if spent >= 0.99 else 1 - spent if spent + score >= 0.99 else score
            expected += step * (states[layer, image, 0].double().numpy() + layer)
            spent += step
        expected += (1 - spent) * (states[2, image, 0].double().numpy() + 2)
        assert_close(out[image, 0].double(), torch.from_numpy(expected), 1e-5)
        ponders = []
        for token in range(1, 9):
            total, steps, rest = 0.0, 0, 1.0
            for score in scores:
                if total < 0.99:
                    steps, rest = steps + 1, 1 - total
                total += score[image, token]
            ponders.append(steps + rest)
        assert_close(
            memory[2].steps[image, 1:] + memory[2].remainder[image, 1:], torch.tensor(ponders, dtype=torch.float32)
        )


def test_avit_wants_the_depths_it_is_told() -> None:
    def prior(spent: list[float]) -> float:
        ones = torch.ones(1, 3)
        counted = {"here": ones, "steps": ones, "remainder": ones, "blocks": 9}
        unused = {"mixed": None, "total": ones, "step": ones[:, 0], "share": ones}
        notes = {
            at: avit._PonderNote(spent=torch.tensor(share), depth=at / 9, **counted, **unused)
            for at, share in zip((5, 6, 7), spent, strict=True)
        }
        return float(AViT("new", target=6 / 9, ponder_weight=0.0).loss(notes))

    # the fourth is the end of the model, three blocks behind the target
    bell = np.array([math.exp(-0.5), 1.0, math.exp(-0.5), math.exp(-4.5)])
    wanted = bell / bell.sum()
    assert prior(wanted[:3].tolist()) == pytest.approx(0.0, abs=1e-6)
    for spent in ([0.3, 0.3, 0.3, 0.1], [0.9, 0.05, 0.04, 0.01], [*(0.1 * wanted[:3]), 1 - 0.1 * wanted[:3].sum()]):
        expected = 0.1 * float((np.array(spent) * np.log(np.array(spent) / wanted)).sum())
        assert prior(spent[:3]) == pytest.approx(expected, rel=1e-4)


def test_avit_spends_one_per_token() -> None:
    """In every block a score, the rest at the block that halts, nothing after."""
    model, handle = _patched(AViT("new", gamma=2.0, beta=-0.5))
    with torch.no_grad():
        model.train()(torch.randn(IMAGES))
    notes = _notes(handle, avit._PonderNote)
    scores = np.diff(np.stack([np.zeros((2, 65)), *(note.total.numpy() for note in notes)]), axis=0)
    spent = np.zeros((3, 2, 64))
    for image in range(2):
        for token in range(64):
            total = 0.0
            for layer in range(3):
                score = scores[layer, image, token + 1]
                if total < 0.99:
                    spent[layer, image, token] = 1 - total if total + score >= 0.99 else score
                total += score
    assert (spent.sum(axis=0) <= 1 + 1e-6).all() and (spent[1] > 0).any() and (spent[2] == 0).any()
    assert [float(note.spent) for note in notes] == pytest.approx(spent.mean(axis=(1, 2)), abs=1e-5)


def test_adavit_gates_switch_sublayers() -> None:
    model, handle = _patched(AdaViT("new"), r=[4])
    decision, block = model.tokenmerge_modules["0"], model.blocks[0]
    seen: list[Tensor] = []
    block.register_forward_hook(lambda module, args, out: seen.extend((args[0], out)))
    nn.init.zeros_(decision.patch.weight), nn.init.zeros_(decision.sublayers.weight)
    nn.init.ones_(decision.patch.bias)
    for attention, mlp in ((1.0, 1.0), (-1.0, 1.0), (1.0, -1.0), (-1.0, -1.0)):
        seen.clear()
        decision.sublayers.bias.data = torch.tensor([attention, mlp])
        with torch.no_grad():
            model(torch.randn(IMAGES))
            x, out = seen
            x = x + block.attn(block.norm1(x)) * (attention > 0)
            assert_close(out, x + block.mlp(block.norm2(x)) * (mlp > 0))
    assert handle.tokens == [65] * 4  # no patch was to go


def test_adavit_cannot_meet_its_budget_by_chance() -> None:
    """What is drawn differs from what is decided; the loss and its gradients are of the latter."""
    model, handle = _patched(AdaViT("new"), r=[16, 16])
    seen: list[tuple[Tensor, Tensor]] = []
    for decision in model.tokenmerge_modules.values():
        nn.init.zeros_(decision.patch.bias)
        decision.register_forward_hook(lambda module, args, out: seen.append(out))
    model.train()(torch.randn(IMAGES))
    first, second = (patches[:, 1:] >= 0 for patches, _ in seen)
    ratios = [first.float().mean(1), (first & second).float().mean(1)]
    notes = _notes(handle, learned.BudgetNote)
    for note, ratio in zip(notes, ratios, strict=True):
        assert_close(note.ratio, ratio)
        assert not torch.allclose(note.share.sum(1) / 64, ratio)
    used = torch.cat([sublayers >= 0 for _, sublayers in seen], dim=1).float().mean(1)
    expected = sum((ratio - target).square().mean() for ratio, target in zip(ratios, (0.75, 0.5), strict=True)) / 2
    assert_close(handle.loss(), 2.0 * (expected + (used - 0.9).square().mean()))
    handle.loss().backward()
    for decision in model.tokenmerge_modules.values():
        assert decision.patch.bias.grad.abs() > 0


def test_adaptive_methods_take_what_the_batch_allows() -> None:
    view = _with_module(AdaViT("new"), _view(4, 18), 6)
    assert view.module is not None
    share = torch.ones(4, 18)
    share[:, 0] = 0
    wants = (view.module(view.x_pre, share)[0][:, 1:] < 0).sum(dim=1)
    for r in (1, 6, 17):
        keep = AdaViT("new").plan(view, r).keep
        assert keep.shape[1] == 18 - min(r, int(wants.min()))


def test_ltmp_at_the_extremes() -> None:
    x = torch.randn(IMAGES)
    model, handle = _patched(LTMP("new", merge_at=1.1, prune_at=-0.1))
    with handle.disabled():
        expected = model(x)
    assert_close(model(x), expected)
    assert handle.tokens == [65] * 4
    for part in model.tokenmerge_modules.values():
        part.merge.data.fill_(-1.1)
    merged = model(x)
    assert handle.tokens == [57, 57, 51, 47]  # all pairs, as far as r goes: ToMe
    with tokenmerge.patched(tiny_twin(model, handle), "tome", r=R) as other:
        assert_close(other.model(x), merged)
    for part in model.tokenmerge_modules.values():
        part.merge.data.fill_(1.1), part.prune.data.fill_(1.1)
    model(x)
    assert handle.tokens == [57, 57, 51, 47] and handle.sizes.max() == 1  # all that r lets go is dropped


@pytest.mark.parametrize("r", [30, 33, 50, 63])
def test_ltmp_captured_removes_exactly_r(r: int) -> None:
    model, handle = _patched(LTMP("new"), r=[0, r], depth=2)
    torch._dynamo.reset()
    model_out = torch.compile(model, backend="eager", fullgraph=True)(torch.randn(IMAGES))
    assert model_out.isfinite().all() and handle.tokens == [65, 65 - r]
    assert torch.equal(handle.sizes.sum(dim=1) <= 65, torch.ones(2, dtype=torch.bool))


def tiny_twin(model: nn.Module, handle: tokenmerge.Handle) -> nn.Module:
    twin = copy.deepcopy(model)
    tokenmerge.unpatch(twin)
    return twin


def test_ltmp_against_loops() -> None:
    view = _view(1, 19)
    method = LTMP("new", merge_at=0.25, prune_at=0.045)
    view = _with_module(method, view, 9)
    assert view.k is not None and view.q is not None and view.size is not None and view.bias is not None
    plan = method.plan(view, 9)
    x, size = method.merge(plan, view.x, view.size)
    key = view.k[0].double().numpy().mean(axis=0)
    key = key / np.linalg.norm(key, axis=1, keepdims=True)
    merged = {}
    for a in range(2, 19, 2):
        b = max(range(1, 19, 2), key=lambda b: float(key[a] @ key[b]))
        if key[a] @ key[b] > 0.25:
            merged[a] = b
    received = np.zeros(19)
    for head in range(3):
        for i in range(19):
            score = [float(view.q[0, head, i] @ view.k[0, head, j]) / 8**0.5 for j in range(19)]
            weight = np.exp(np.array(score) + view.bias[0].numpy())
            received += weight / weight.sum() / (3 * 19)
    touched = {0, *merged, *merged.values()}
    dropped = [i for i in range(19) if i not in touched and received[i] < 0.045]
    assert merged and dropped and len(merged) + len(dropped) <= 9
    kept = [i for i in (0, *range(2, 19, 2), *range(1, 19, 2)) if i not in merged and i not in dropped]
    groups = [[i] + [a for a, b in merged.items() if b == i] for i in kept]
    mean, total = third_opinion.weighted_mean(view.x[0].double().numpy(), view.size[0].double().numpy(), groups)
    assert plan.keep[0].tolist() == kept
    assert_close(x[0].double(), torch.from_numpy(mean), 1e-5)
    assert size is not None and size[0].tolist() == total.tolist()


def test_ltmp_counts_what_blocks_cost() -> None:
    method = LTMP("new", merge_at=0.3, prune_at=0.01, budget_weight=1.0)
    model, handle = _patched(method, r=[8, 8])
    model.train()(torch.randn(1, 3, 32, 32))

    def cost(attended: float, left: float) -> float:
        return 4 * 32 * attended + 2 * attended**2 + 8 * 32 * left

    first, second = (float(_memory(handle)[layer].share.sum().detach()) + 1 for layer in (0, 1))
    found = (cost(65, first) + cost(first, second)) / (2 * cost(65, 65))
    planned = (cost(65, 57) + cost(57, 49)) / (2 * cost(65, 65))
    assert handle.loss().item() == pytest.approx((found - planned) ** 2, rel=1e-4)
    handle.remove()
    model, handle = _patched(replace(method, flops=0.5), r=[8, 8])
    model.train()(torch.randn(1, 3, 32, 32))
    assert handle.loss().item() >= 0
