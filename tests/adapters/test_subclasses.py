"""Models with code of their own behind the blocks or around them: right all the same, and the report says how."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from other_models import VISION, clip, lucidrains, torchvision_vit
from torch import Tensor, nn

import tokenmerge
from helpers import answer, assert_close, bound_attributes, randomised, tiny_vit
from tokenmerge.errors import UnsupportedError
from tokenmerge.testing.models.clip import ClipTowerStandIn
from tokenmerge.testing.models.dino import DinoStandIn, DinoV2StandIn
from tokenmerge.testing.models.plain import MAEStandIn, SwagStandIn
from tokenmerge.testing.models.video import VideoMAEStandIn

IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()
CLIP = torch.randn(2, 3, 8, 32, 32, generator=torch.Generator().manual_seed(2)).double()
TINY = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 4, "num_classes": 10}


class Host:
    """How a host's model runs its blocks, as somebody would write it who knows the host."""

    def make(self) -> nn.Module:
        raise NotImplementedError

    def blocks(self, model: Any) -> Any:
        return model.blocks

    def enter(self, model: Any, x: Tensor) -> Tensor:
        """What goes into the first block."""
        raise NotImplementedError

    def tokens(self, model: Any, x: Tensor) -> Tensor:  # -> [B, N, C]
        """What leaves the last block, by the host's own means where it has some."""
        return _loop(self, model, x)[-1]

    def batch_first(self, x: Tensor) -> Tensor:
        return x

    def answer(self, model: Any, features: Tensor) -> Tensor:
        out: Tensor = model.head(features)
        return out

    x = IMAGE


def _loop(host: Host, model: Any, x: Tensor) -> list[Tensor]:
    x, found = host.enter(model, x), []
    for block in host.blocks(model):
        x = block(x)
        x = x[0] if isinstance(x, tuple) else x
        found.append(host.batch_first(x))
    return found


class Timm(Host):
    def __init__(self, cls: str, **options: Any) -> None:
        self.cls, self.options = cls, {**TINY, **options}

    def make(self) -> nn.Module:
        import timm.models

        module, _, name = self.cls.rpartition(".")
        model: nn.Module = getattr(getattr(timm.models, module), name)(**self.options)
        return model

    def enter(self, model: Any, x: Tensor) -> Tensor:
        out = model._pos_embed(model.patch_embed(x))
        return out[0] if isinstance(out, tuple) else out  # type: ignore[no-any-return]

    def tokens(self, model: Any, x: Tensor) -> Tensor:
        out: Tensor = model.forward_features(x)
        return out


class TimmBeit(Timm):
    def enter(self, model: Any, x: Tensor) -> Tensor:
        x = model.patch_embed(x)
        return torch.cat((model.cls_token.expand(x.shape[0], -1, -1), x), dim=1)


class Torchvision(Host):
    def make(self) -> nn.Module:
        model: nn.Module = torchvision_vit()
        return model

    def blocks(self, model: Any) -> Any:
        return model.encoder.layers

    def enter(self, model: Any, x: Tensor) -> Tensor:
        x = model._process_input(x)
        out: Tensor = torch.cat((model.class_token.expand(x.shape[0], -1, -1), x), 1) + model.encoder.pos_embedding
        return out

    def answer(self, model: Any, features: Tensor) -> Tensor:
        out: Tensor = model.heads(features)
        return out

    def tokens(self, model: Any, x: Tensor) -> Tensor:
        x = model._process_input(x)
        out: Tensor = model.encoder(torch.cat((model.class_token.expand(x.shape[0], -1, -1), x), dim=1))
        return out


class OpenClip(Host):
    def make(self) -> nn.Module:
        model: nn.Module = clip(pool_type="avg").visual
        return model

    def blocks(self, model: Any) -> Any:
        return model.transformer.resblocks

    def enter(self, model: Any, x: Tensor) -> Tensor:
        out: Tensor = model._embeds(x)
        return out

    def answer(self, model: Any, features: Tensor) -> Tensor:
        out: Tensor = features @ model.proj
        return out


class OpenAIClip(OpenClip):
    def make(self) -> nn.Module:
        return ClipTowerStandIn(patch_size=4)

    def enter(self, model: Any, x: Tensor) -> Tensor:
        x = model.conv1(x).flatten(2).permute(0, 2, 1)
        x = torch.cat((model.class_embedding.expand(x.shape[0], 1, -1), x), dim=1) + model.positional_embedding
        return model.ln_pre(x).permute(1, 0, 2)  # type: ignore[no-any-return]

    def batch_first(self, x: Tensor) -> Tensor:
        return x.permute(1, 0, 2)


class VitPytorch(Host):
    def make(self) -> nn.Module:
        model: nn.Module = lucidrains("ViT")
        return model

    def enter(self, model: Any, x: Tensor) -> Tensor:
        x = model.to_patch_embedding(x)
        out: Tensor = torch.cat((model.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + model.pos_embedding
        return out

    def tokens(self, model: Any, x: Tensor) -> Tensor:
        out: Tensor = model.transformer(self.enter(model, x))
        return out

    def answer(self, model: Any, features: Tensor) -> Tensor:
        out: Tensor = model.mlp_head(features)
        return out


class Dino(Host):
    def make(self) -> nn.Module:
        return DinoStandIn(patch_size=4)

    def enter(self, model: Any, x: Tensor) -> Tensor:
        out: Tensor = model.prepare_tokens(x)
        return out


class DinoV2(Host):
    def make(self) -> nn.Module:
        return DinoV2StandIn(patch_size=4)

    def enter(self, model: Any, x: Tensor) -> Tensor:
        out: Tensor = model.prepare_tokens_with_masks(x)
        return out


class Mae(Host):
    def make(self) -> nn.Module:
        return MAEStandIn(patch_size=4, global_pool=False)

    def enter(self, model: Any, x: Tensor) -> Tensor:
        x = model.patch_embed(x)
        out: Tensor = torch.cat((model.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + model.pos_embed
        return out


class MaeSt(Host):
    x = CLIP

    def make(self) -> nn.Module:
        return VideoMAEStandIn(cls_embed=False, sep_pos_embed=False, patch=(2, 8, 8))

    def enter(self, model: Any, x: Tensor) -> Tensor:
        out: Tensor = model.patch_embed(x).flatten(1, -2) + model.pos_embed
        return out


class Swag(Host):
    def make(self) -> nn.Module:
        return SwagStandIn(patch_size=4)

    def blocks(self, model: Any) -> Any:
        return model.encoder.layers

    def enter(self, model: Any, x: Tensor) -> Tensor:
        x = model.conv_proj(x).flatten(2).permute(2, 0, 1)
        out: Tensor = torch.cat((model.class_token.expand(-1, x.shape[1], -1), x)) + model.encoder.pos_embedding
        return out

    def batch_first(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1)


class HuggingFace(Host):
    def __init__(self, name: str) -> None:
        self.name = name

    def make(self) -> nn.Module:
        transformers = pytest.importorskip("transformers", reason="transformers is not installed")
        sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
        config = getattr(transformers, f"{self.name}Config")(**sizes, image_size=32, patch_size=4)
        model: nn.Module = getattr(transformers, f"{self.name}Model")(config)
        return model

    def blocks(self, model: Any) -> Any:
        return model.layers if hasattr(model, "layers") else model.encoder.layer

    def enter(self, model: Any, x: Tensor) -> Tensor:
        out: Tensor = model.embeddings(x)
        return out

    def tokens(self, model: Any, x: Tensor) -> Tensor:
        out: Tensor = super(type(model), model).forward(x).last_hidden_state
        return out

    def answer(self, model: Any, features: Tensor) -> Tensor:
        return features


HOSTS: dict[str, Host] = {
    "timm-vit": Timm("vision_transformer.VisionTransformer"),
    "timm-vit-avg": Timm("vision_transformer.VisionTransformer", global_pool="avg"),
    "timm-eva": Timm("eva.Eva", use_rot_pos_emb=False),
    "timm-beit": TimmBeit("beit.Beit", use_abs_pos_emb=False),
    "torchvision": Torchvision(),
    "open-clip": OpenClip(),
    "openai-clip": OpenAIClip(),
    "vit-pytorch": VitPytorch(),
    "dino": Dino(),
    "dinov2": DinoV2(),
    "mae": Mae(),
    "mae-st": MaeSt(),
    "swag": Swag(),
    "hf-vit": HuggingFace("ViT"),
}
Forward = Callable[[Host, Any, Tensor], Tensor]
FORWARDS: dict[str, Forward] = {
    "mean": lambda host, model, x: host.answer(model, host.tokens(model, x)[:, 1:].mean(dim=1)),
    "mean-and-class": lambda host, model, x: host.answer(model, _first_and_mean(host.tokens(model, x))),
    "standard-deviation": lambda host, model, x: host.answer(model, host.tokens(model, x).std(dim=1)),
    "own-loop": lambda host, model, x: host.answer(model, _loop(host, model, x)[-1].mean(dim=1)),
    "mean-of-layers": lambda host, model, x: host.answer(
        model, torch.stack([tokens.mean(dim=1) for tokens in _loop(host, model, x)]).mean(dim=0)
    ),
    "layers-side-by-side": lambda host, model, x: torch.cat(_loop(host, model, x)[1:3], dim=-1),
}


def _first_and_mean(tokens: Tensor) -> Tensor:
    return tokens[:, 0] + tokens[:, 1:].mean(dim=1)


def _own(host: Host, forward: Forward) -> Any:
    """The host's model, of a class that is made from its own and has this forward."""
    model = randomised(host.make()).eval().double()
    cls = type(model)
    model.__class__ = type("Own", (cls,), {"forward": lambda self, x: forward(host, self, x)})
    return model


def _run(model: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return answer(model(x)).clone()


LOOPS = ("own-loop", "mean-of-layers", "layers-side-by-side")
# blocks of vit-pytorch are pairs that nobody can call
OWN = [(name, kind) for name in HOSTS for kind in FORWARDS if name != "vit-pytorch" or kind not in LOOPS]


@pytest.mark.parametrize(("name", "kind"), OWN)
def test_a_class_with_a_forward_of_its_own_is_right(name: str, kind: str) -> None:
    host = HOSTS[name]
    model = _own(host, FORWARDS[kind])
    unmerged = _run(model, host.x)
    handle = tokenmerge.patch(model, r=6, prop_attn=True, track=True)
    merged, groups, positions, limits = _run(model, host.x), handle.groups, handle.positions, handle.report().limits
    assert handle.tokens[-1] < groups[0].shape[1]
    handle.remove()
    assert bound_attributes(model) == []
    assert_close(merged, answer(tokenmerge.simulate(model, groups, host.x, positions=positions)), 1e-6)
    assert (merged - unmerged).abs().max() > 1e-3, "merging changed nothing: the comparison would be empty"
    if (name, kind) == ("mae-st", "own-loop"):
        return  # the mean over all tokens that its own forward takes, too
    assert any("put back in their places" in limit for limit in limits)
    # DINOv2's own reason comes first: it hands out its tokens in any case
    assert any("Own" in limit for limit in limits) or (name == "dinov2" and kind not in LOOPS[1:])


@pytest.mark.parametrize("name", HOSTS)
def test_a_class_of_which_only_the_making_differs_is_trusted(name: str) -> None:
    model = randomised(HOSTS[name].make()).eval().double()
    with tokenmerge.patched(model, r=6) as handle:
        expected, limits = _run(model, HOSTS[name].x), handle.report().limits
    model.__class__ = type("Own", (type(model),), {"__init__": lambda self: None, "extra": lambda self: None})
    with tokenmerge.patched(model, r=6) as handle:
        assert torch.equal(_run(model, HOSTS[name].x), expected)
        assert handle.report().limits == limits
    # these hand out tokens whatever made them
    assert not any("put back" in limit for limit in limits) or name in ("dinov2", "hf-vit")


def _pooled(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    out: Tensor = self.head(x[:, self.num_prefix_tokens :].mean(dim=1))
    return out


@pytest.mark.parametrize("on", ["class", "instance", "wrapped"])
@pytest.mark.parametrize("method", ["pool", "forward_head"])
def test_pooling_of_ones_own_is_named(method: str, on: str) -> None:
    import functools

    model: Any = tiny_vit().double()
    own = _pooled if method == "forward_head" else lambda self, x, pool_type=None: x[:, 1:].mean(dim=1)
    if on == "class":
        model.__class__ = type("Own", (type(model),), {method: own})
    else:
        # what functools.wraps makes looks like what it wraps
        function = functools.wraps(getattr(type(model), method))(own) if on == "wrapped" else own
        setattr(model, method, types.MethodType(function, model))
    handle = tokenmerge.patch(model, r=6, track=True)
    merged, groups = _run(model, IMAGE), handle.groups
    assert handle.report().limits == [
        f"tokens are put back in their places after the last block: {method} of {type(model).__name__} is not timm's "
        "own"
    ]
    handle.remove()
    assert_close(merged, tokenmerge.simulate(model, groups, IMAGE), 1e-6)


def test_a_forward_that_hands_on_to_the_hosts_is_the_hosts() -> None:
    import functools

    model: Any = tiny_vit()
    model.forward = torch.no_grad()(model.forward)
    with tokenmerge.patched(model, r=6) as handle:
        assert handle.report().limits == []
    model.forward = functools.partial(type(model).forward, model)
    with tokenmerge.patched(model, r=6) as handle:
        assert handle.report().limits == []


def test_maxima_and_class_tokens_of_a_host_without_a_name_need_no_restoring() -> None:
    dino = HOSTS["dino"]
    for forward in (
        lambda host, model, x: host.tokens(model, x).amax(dim=1),
        lambda host, model, x: host.tokens(model, x)[:, 0],
        lambda host, model, x: torch.cat([tokens[:, 0] for tokens in _loop(host, model, x)], dim=-1),
    ):
        model = _own(dino, forward)
        unmerged = _run(model, IMAGE)
        handle = tokenmerge.patch(model, r=6, track=True)
        merged, groups = _run(model, IMAGE), handle.groups
        assert handle.report().limits == []
        handle.remove()
        assert_close(merged, tokenmerge.simulate(model, groups, IMAGE), 1e-6)
        assert (merged - unmerged).abs().max() > 1e-3


def test_a_classifier_of_zeros_hides_nothing() -> None:
    model = _own(HOSTS["mae"], FORWARDS["mean"])
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    handle = tokenmerge.patch(model, r=6, track=True)
    nn.init.normal_(model.head.weight)
    merged, groups = _run(model, IMAGE), handle.groups
    handle.remove()
    assert_close(merged, tokenmerge.simulate(model, groups, IMAGE), 1e-6)


def test_a_forward_that_cannot_be_tried_is_not_trusted() -> None:
    def shy(host: Host, model: Any, x: Tensor) -> Tensor:
        if x.shape[0] == 2:
            raise ValueError("not two")
        return host.tokens(model, x).mean(dim=1)

    model = _own(HOSTS["dino"], shy)
    x = torch.cat((IMAGE, IMAGE[:1]))
    handle = tokenmerge.patch(model, r=6, track=True)
    merged, groups = _run(model, x), handle.groups
    assert handle.report().limits == [
        "tokens are put back in their places after every block: Own could not be tried on tokens made for it "
        "(ValueError: not two)"
    ]
    handle.remove()
    assert_close(merged, tokenmerge.simulate(model, groups, x), 1e-6)


@pytest.mark.parametrize("make", [lambda: DinoStandIn(patch_size=4), lambda: MAEStandIn(patch_size=4)])
def test_trying_a_model_leaves_it_alone(make: Callable[[], nn.Module]) -> None:
    model = randomised(make()).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    tokenmerge.patch(model, r=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    tokenmerge.unpatch(model)
    assert bound_attributes(model) == []


POOLS: dict[str, dict[str, Any]] = {
    "token": {},
    "avg": {"global_pool": "avg"},
    "avgmax": {"global_pool": "avgmax"},
    "none": {"global_pool": ""},
    "map": {"global_pool": "map"},
    "map-no-class": {"global_pool": "map", "class_token": False},
}
SURGERY = {
    "timm-vit": (Timm("vision_transformer.VisionTransformer"), tuple(POOLS)),
    "timm-eva": (Timm("eva.Eva", use_rot_pos_emb=False), ("token", "avg", "none", "map")),
    "timm-beit": (TimmBeit("beit.Beit", use_abs_pos_emb=False), ("token", "avg", "none")),
    "timm-relpos": (Timm("vision_transformer_relpos.VisionTransformerRelPos", class_token=True, rel_pos_dim=8), ()),
    "timm-cait": (Timm("cait.Cait"), ("token", "avg", "none")),
    "timm-naflex": (Timm("naflexvit.NaFlexVit"), ("token", "avg", "none", "map")),
}
SURGERY["timm-relpos"] = (SURGERY["timm-relpos"][0], ("token", "avg", "none"))
CHANGES = [(name, pool) for name, (_, pools) in SURGERY.items() for pool in pools]


def _built(name: str, pool: str) -> Any:
    host, options = SURGERY[name][0], dict(POOLS[pool])
    settings = {**host.options, **options}  # type: ignore[attr-defined]
    if name == "timm-naflex":
        del settings["img_size"]
        settings |= {"pos_embed_grid_size": (8, 8), "class_token": True}
    torch.manual_seed(0)
    return randomised(Timm.make(types.SimpleNamespace(cls=host.cls, options=settings))).eval().double()  # type: ignore


def _pooling(model: Any, kind: str) -> Any:
    model.reset_classifier(7, kind)
    return model.double()


@pytest.mark.parametrize("kind", ["token", "avg", "avgmax", "map", ""])
@pytest.mark.parametrize(("name", "pool"), CHANGES)
def test_pooling_that_is_changed_after_patching(name: str, pool: str, kind: str) -> None:
    import timm

    try:
        _run(_pooling(_built(name, pool), kind), IMAGE)
    except AssertionError as refusal:
        pytest.skip(f"timm {timm.__version__} does not do this: {refusal}")
    outs = []
    for is_patched_first in (True, False):
        model = _built(name, pool)
        if is_patched_first:
            tokenmerge.patch(model, r=6)
            assert _run(model, IMAGE).isfinite().all()
        torch.manual_seed(1)
        _pooling(model, kind)
        if not is_patched_first:
            tokenmerge.patch(model, r=6)
        try:
            outs.append(_run(model, IMAGE))
        except UnsupportedError as error:
            assert is_patched_first and kind == "" and "patch it again" in str(error)
            return
    assert_close(outs[0], outs[1], 1e-9)


def test_an_attention_pool_that_is_replaced_after_patching_is_refused() -> None:
    model: Any = tiny_vit(global_pool="map").double()
    handle = tokenmerge.patch(model, r=6)
    model.attn_pool = tiny_vit(global_pool="map").double().attn_pool
    with pytest.raises(UnsupportedError, match=r"has another attn_pool since it was patched.*r is not 0.*patch it aga"):
        model(IMAGE)
    handle.r = 0
    _run(model, IMAGE)


def test_pooling_of_open_clip_that_is_changed_after_patching() -> None:
    for before, after in (("tok", "avg"), ("avg", "tok"), ("none", "avg"), ("none", "tok")):
        outs = []
        for is_patched_first in (True, False):
            torch.manual_seed(0)
            tower = randomised(clip(pool_type=before).visual).eval().double()
            if is_patched_first:
                tokenmerge.patch(tower, r=6)
            tower.pool_type = after
            if not is_patched_first:
                tokenmerge.patch(tower, r=6)
            outs.append(_run(tower, IMAGE))
        assert_close(outs[0], outs[1], 1e-9)
    for name, value in (("pool_type", "none"), ("output_tokens", True)):
        tower = randomised(clip().visual).eval().double()
        tokenmerge.patch(tower, r=6)
        setattr(tower, name, value)
        with pytest.raises(UnsupportedError, match=r"given another pooling since it was patched .*patch it again"):
            tower(IMAGE)
    assert VISION["patch_size"] == 4


def test_pooling_of_vit_pytorch_that_is_changed_after_patching() -> None:
    outs = []
    for is_patched_first in (True, False):
        torch.manual_seed(0)
        model = randomised(lucidrains("ViT")).eval().double()
        if is_patched_first:
            tokenmerge.patch(model, r=6)
        model.pool = "mean"
        if not is_patched_first:
            tokenmerge.patch(model, r=6)
        outs.append(_run(model, IMAGE))
    assert_close(outs[0], outs[1], 1e-9)


TOKENS = [(name, pool) for name, pool in CHANGES if pool == "none"]


@pytest.mark.parametrize("num_classes", [10, 0])
@pytest.mark.parametrize(("name", "pool"), TOKENS)
def test_a_timm_model_without_pooling_hands_out_every_token(name: str, pool: str, num_classes: int) -> None:
    model = _built(name, pool)
    model.reset_classifier(num_classes)
    model.double()
    unmerged = _run(model, IMAGE)
    with tokenmerge.patched(model, r=6, prop_attn=True, track=True) as handle:
        restored, groups, positions, limits = (
            _run(model, IMAGE),
            handle.groups,
            handle.positions,
            handle.report().limits,
        )
        left = handle.tokens[-1]
    assert restored.shape == unmerged.shape and left < groups[0].shape[1]
    assert_close(restored, tokenmerge.simulate(model, groups, IMAGE, positions=positions), 1e-6)
    assert (restored - unmerged).abs().max() > 1e-3
    assert any("after the last block" in limit for limit in limits)
    if name == "timm-cait":
        return  # its class token attends to every patch
    with tokenmerge.patched(model, r=6, restore="merged", track=True, prop_attn=True) as handle:
        merged = _run(model, IMAGE)
        assert merged.shape[1] == left == handle.sizes.shape[1]
        assert_close(handle.dense(merged), restored, 1e-9)
        assert any("merged tokens are handed out" in limit for limit in handle.report().limits)


def test_parts_of_ones_own_are_named() -> None:
    tower = randomised(clip().visual).eval().double()
    own = {"_global_pool": lambda self, x: (x[:, 1:].mean(dim=1), x[:, 1:])}
    tower.__class__ = type("Own", (type(tower),), own)
    vision = randomised(torchvision_vit()).eval().double()
    encoder = vision.encoder
    encoder.__class__ = type("Own", (type(encoder),), {"forward": _mean_of_layers})
    for model, after, method in ((tower, "the last block", "_global_pool"), (vision, "every block", "forward")):
        handle = tokenmerge.patch(model, r=6, track=True)
        merged, groups, limits = _run(model, IMAGE), handle.groups, handle.report().limits
        assert any(f"after {after}: {method} of Own is not " in limit for limit in limits)
        handle.remove()
        assert_close(merged, tokenmerge.simulate(model, groups, IMAGE), 1e-6)


def _mean_of_layers(self: Any, x: Tensor) -> Tensor:
    x, total = x + self.pos_embedding, torch.zeros(())
    for layer in self.layers:
        x = layer(x)
        total = total + x.mean(dim=1, keepdim=True)
    return total


def test_a_classifier_of_hugging_face_with_a_forward_of_its_own() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")

    class Averaged(transformers.ViTForImageClassification):  # type: ignore[misc,name-defined]
        def forward(self, pixel_values: Tensor) -> Tensor:
            return self.classifier(self.vit(pixel_values).last_hidden_state[:, 1:].mean(dim=1))  # type: ignore

    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
    model = randomised(Averaged(transformers.ViTConfig(**sizes, image_size=32, patch_size=8))).eval().double()
    handle = tokenmerge.patch(model, r=3, track=True)
    merged, groups = _run(model, IMAGE), handle.groups
    assert handle.report().limits == [
        "tokens are put back in their places after every block: "
        f"forward of {Averaged.__qualname__} is not transformers' own"
    ]
    handle.remove()
    assert_close(merged, tokenmerge.simulate(model, groups, IMAGE), 1e-6)


def test_a_forward_that_accelerate_has_wrapped_is_the_hosts() -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = tiny_vit()
    accelerate.hooks.add_hook_to_module(model, accelerate.hooks.ModelHook())
    with tokenmerge.patched(model, r=6) as handle:
        assert handle.report().limits == []
