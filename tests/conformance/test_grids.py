"""Methods by place see the rows and columns of the image in hand, whatever shape the model was built for."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import tokenmerge
from helpers import answer, assert_close, run_in_threads, tiny_vit
from tokenmerge.adapters import ADAPTERS
from tokenmerge.adapters.base import Adapter, WindowSpec
from tokenmerge.errors import UnsupportedError
from tokenmerge.methods import Reduction, TokenView, ToMe2D
from tokenmerge.plan import Plan

pytestmark = pytest.mark.hosts
METHODS = ["tome2d", "gtp", "dsm", "algm"]
every_method = pytest.mark.parametrize("method", METHODS)
SEEN: list[tuple[int, int] | None] = []  # grids that `_Looking` was shown


@dataclass(frozen=True)
class _Looking(ToMe2D):
    """Notes the grid, and merges as ToMe2D does."""

    name: ClassVar[str] = "looking"

    def plan(self, view: TokenView, r: int) -> Plan:
        SEEN.append(view.grid)
        return super().plan(view, r)


def _grids(model: nn.Module, x: Any, method: Reduction | None = None, **options: Any) -> set[tuple[int, int] | None]:
    SEEN.clear()
    with tokenmerge.patched(model, method or _Looking(), r=2), torch.no_grad():
        model(x, **options)
    return set(SEEN)


def _places(adapter: Adapter) -> bool:
    model, _ = adapter.tiny()
    adapter = adapter.resolve(model)
    is_windowed = any(isinstance(adapter.spec(block), WindowSpec) for _, block in adapter.blocks(model))
    return adapter.layout(model).grid is not None and not is_windowed


PLACED = [adapter for adapter in ADAPTERS if _places(adapter)]


@pytest.mark.parametrize("adapter", PLACED, ids=lambda adapter: adapter.name)
def test_the_grid_of_a_familys_own_size(adapter: Adapter) -> None:
    model, x = adapter.tiny()
    resolved = adapter.resolve(model)
    assert resolved.surroundings(model).cutter is not None
    assert _grids(model, x) == {resolved.layout(model).grid}


def _timm(**options: Any) -> nn.Module:
    return tiny_vit(img_size=32, patch_size=8, **options)


def _create(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import timm

        return timm.create_model(name, depth=2, embed_dim=64, num_heads=4, num_classes=10, **options)

    return make


def _tiny(name: str) -> Callable[[], nn.Module]:
    return lambda: next(adapter for adapter in ADAPTERS if adapter.name == name).tiny()[0]


_PADDED = {"dynamic_img_size": True, "dynamic_img_pad": True}
# a model that takes images of 2 x 8 and 8 x 2 patches of 8 pixels beside its own 4 x 4, and how it is called with them
SHAPED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "timm_vit": (lambda: _timm(dynamic_img_size=True), {}),
    "timm_vit padded": (lambda: _timm(**_PADDED), {}),
    "timm_eva": (_create("eva02_tiny_patch14_224", img_size=32, patch_size=8, dynamic_img_size=True), {}),
    "timm_naflex": (_tiny("timm_naflex"), {}),
    "vit_pytorch": (_tiny("vit_pytorch"), {}),
    "open_clip": (_tiny("open_clip"), {}),
    "dino": (_tiny("dino"), {}),
    "dinov2": (_tiny("dinov2"), {}),
    **{f"hf_{name}": (_tiny(f"hf_{name}"), {"interpolate_pos_encoding": True}) for name in ("vit", "clip")},
    "hf_dinov2": (_tiny("hf_dinov2"), {}),
    "hf_dinov3": (_tiny("hf_dinov3"), {}),
    "hf_yolos": (_tiny("hf_yolos"), {}),
}


@pytest.mark.parametrize("name", SHAPED)
def test_an_image_of_another_shape_with_as_many_patches(name: str) -> None:
    make, options = SHAPED[name]
    model, lost = make().eval(), 3 if name.endswith("padded") else 0
    for rows, columns in ((2, 8), (8, 2), (4, 4)):
        image = torch.randn(2, 3, 8 * rows - lost, 8 * columns - lost)
        assert _grids(model, image, **options) == {(rows, columns)}


@every_method
@pytest.mark.parametrize("shape", [(64, 16), (16, 64)], ids=str)
def test_the_answer_is_that_of_a_model_built_for_the_shape(method: str, shape: tuple[int, int]) -> None:
    landscape = _timm(dynamic_img_size=True)
    with torch.no_grad():
        landscape.pos_embed[:, 1:] = 0
    built = tiny_vit(img_size=shape, patch_size=8)
    built.load_state_dict(landscape.state_dict())
    image = torch.randn(2, 3, *shape)
    handles = [tokenmerge.patch(model, method, r=4, track=True) for model in (landscape, built)]
    with torch.no_grad():
        assert_close(landscape(image), built(image), 1e-5)
    for one, other in zip(handles[0].groups, handles[1].groups, strict=True):
        assert torch.equal(one, other)


@every_method
def test_the_size_may_be_set_afterwards(method: str) -> None:
    model, image = tiny_vit(img_size=32, patch_size=8), torch.randn(2, 3, 16, 64)
    tokenmerge.patch(model, method, r=4)
    model.set_input_size(img_size=(16, 64))  # type: ignore[operator]
    again = copy.deepcopy(model)
    tokenmerge.unpatch(again)
    tokenmerge.patch(again, method, r=4)
    with torch.no_grad():
        assert_close(model(image), again(image), 1e-6)


@pytest.mark.parametrize("method", ["tome2d", "dsm"])
@pytest.mark.parametrize("part", ["model", "blocks"])
def test_compiled_graphs_follow_the_shape(method: str, part: str) -> None:
    torch._dynamo.reset()
    model: Any = tiny_vit(img_size=32, patch_size=8, dynamic_img_size=True, depth=2)
    tokenmerge.patch(model, method, r=4)
    images = [torch.randn(2, 3, *shape) for shape in ((32, 32), (16, 64), (64, 16))]
    with torch.no_grad():
        expected = [model(image) for image in images]
        for module in (model,) if part == "model" else model.blocks:
            module.compile(backend="eager", fullgraph=module is model)
        for image, answer in zip(images, expected, strict=True):
            assert_close(model(image), answer, 1e-5)


def _gradient(model: nn.Module, image: Tensor, others: list[Tensor]) -> Tensor:
    model.zero_grad()
    loss = answer(model(image)).square().sum()
    with torch.no_grad():
        for other in others:
            model(other)
    loss.backward()
    found = model.blocks[0].attn.qkv.weight.grad  # type: ignore[union-attr, index]
    assert isinstance(found, Tensor)
    return found.clone()


@every_method
def test_checkpoints_run_again_with_the_grid_they_had(method: str) -> None:
    model = _timm(dynamic_img_size=True)
    tokenmerge.patch(model, method, r=4)
    wide, high = torch.randn(2, 3, 16, 64), torch.randn(2, 3, 64, 16)
    expected = _gradient(model, wide, [])
    model.set_grad_checkpointing()  # type: ignore[operator]
    assert_close(_gradient(model, wide, [high]), expected, 1e-5)


def test_threads_and_copies_have_grids_of_their_own() -> None:
    model = _timm(dynamic_img_size=True)
    tokenmerge.patch(model, "tome2d", r=4)
    images = [torch.randn(2, 3, *shape) for shape in ((16, 64), (64, 16))]
    with torch.no_grad():
        expected = [model(image) for image in images]
    copied = pickle.loads(pickle.dumps(model))
    wrong: list[int] = []

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(20):
                wrong.extend(i for one in (model, copied) if not torch.allclose(one(images[i]), expected[i], atol=1e-5))

    run_in_threads(work, 2)
    assert not wrong


def test_tokens_whose_grid_is_not_known_are_refused() -> None:
    model: Any = _timm(dynamic_img_size=True)
    tokenmerge.patch(model, "tome2d", r=4)
    wide, high = torch.randn(2, 3, 16, 64), torch.randn(2, 3, 64, 16)
    with torch.no_grad():
        model(wide)
        with pytest.raises(UnsupportedError, match="no image was cut into patches in this forward"):
            model.blocks[0](torch.randn(2, 17, 32))
        tokens = [model._pos_embed(model.patch_embed(image)) for image in (wide, high)]
        with pytest.raises(UnsupportedError, match="images of 2 x 8 and 8 x 2 patches were cut before the blocks ran"):
            model.blocks[0](tokens[0])
        # an image that the model did not take leaves nothing behind
        expected = model(wide)
        model.patch_embed(torch.randn(2, 3, 32, 16))
        assert_close(model(wide), expected, 1e-6)
        with pytest.raises(UnsupportedError, match="tokens were dropped or added before it"):
            model.blocks[0](torch.cat((model._pos_embed(model.patch_embed(wide)), torch.randn(2, 3, 32)), dim=1))


def test_a_cutter_that_was_replaced_is_refused_or_found() -> None:
    model: Any = _timm()
    tokenmerge.patch(model, "tome2d", r=4)
    model.patch_embed = copy.deepcopy(model.patch_embed)
    model.patch_embed.__dict__.pop("forward")
    with torch.no_grad(), pytest.raises(UnsupportedError, match="no image was cut into patches"):
        model(torch.randn(2, 3, 32, 32))


def test_patches_of_many_shapes_are_no_grid() -> None:
    model: Any = _tiny("timm_naflex")()
    patches, valid = torch.randn(2, 16, 192), torch.ones(2, 16, dtype=torch.bool)
    places = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(8), indexing="ij"), dim=-1).view(1, 16, 2)
    batch = {"patches": patches, "patch_coord": places.expand(2, -1, -1), "patch_valid": valid}
    tokenmerge.patch(model, "tome2d", r=4)
    with torch.no_grad(), pytest.raises(UnsupportedError, match="says no grid of patches"):
        model(batch)


def test_clips_have_no_rows_and_columns() -> None:
    model, x = next(adapter for adapter in ADAPTERS if adapter.name == "mae_st").tiny()
    tokenmerge.patch(model, "tome2d", r=4)
    with torch.no_grad(), pytest.raises(UnsupportedError, match="says no grid of patches"):
        model(x)
