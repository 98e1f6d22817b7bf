"""Pictures of groups: single patches keep their pixels, merged ones become their mean with a border."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tokenmerge.errors import DataError, UnsupportedError
from tokenmerge.report.plots import plot_tradeoff
from tokenmerge.tools.visualize import draw_clip, draw_features, draw_groups, sheet

ROWS: list[dict[str, Any]] = [
    {"r": "0", "images/s": 10.0, "top-1 %": 90.0, "bound images/s": None},
    {"r": "8", "images/s": 20.0, "top-1 %": 85.0, "bound images/s": 25.0},
]


def _noise(width: int, height: int) -> Any:
    return Image.frombytes("RGB", (width, height), bytes(torch.randint(0, 256, (height * width * 3,)).tolist()))


def _pixels(image: Any) -> torch.Tensor:  # [height, width, 3]
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)


def test_single_patches_keep_their_pixels() -> None:
    image = _noise(24, 16)
    drawn = draw_groups(image, torch.randperm(6), patch_size=8)
    assert drawn.tobytes() == image.tobytes()


def test_one_group_is_one_flat_colour() -> None:
    image = _noise(24, 16)
    pixels = _pixels(draw_groups(image, torch.zeros(6, dtype=torch.long), patch_size=8))
    assert torch.equal(pixels, _pixels(image).float().mean(dim=(0, 1)).round().byte().expand_as(pixels))


@pytest.mark.parametrize("is_turned", [False, True], ids=["left-right", "top-bottom"])
def test_two_groups_are_flat_inside_with_a_border_between(is_turned: bool) -> None:
    image = _noise(16, 32) if is_turned else _noise(32, 16)
    # one half and the other, four patches each; labels need not be counted from 0
    groups = torch.tensor([7, 7, 7, 7, 3, 3, 3, 3] if is_turned else [7, 7, 3, 3, 7, 7, 3, 3])
    pixels = _pixels(draw_groups(image, groups, patch_size=8))
    before = _pixels(image).float()
    if is_turned:
        pixels, before = pixels.transpose(0, 1), before.transpose(0, 1)
    left, right = pixels[:, :15], pixels[:, 17:]
    assert torch.equal(left, before[:, :16].mean(dim=(0, 1)).round().byte().expand_as(left))
    assert torch.equal(right, before[:, 16:].mean(dim=(0, 1)).round().byte().expand_as(right))
    for column in (15, 16):
        assert len(pixels[:, column].unique(dim=0)) == 1
        assert not torch.equal(pixels[0, column], pixels[0, 0])
        assert not torch.equal(pixels[0, column], pixels[0, 31])
    assert not torch.equal(pixels[0, 15], pixels[0, 16]), "each group has a border of its own colour"


def test_patches_of_a_group_need_not_touch_and_others_keep_their_pixels() -> None:
    image = _noise(24, 8)
    pixels, before = _pixels(draw_groups(image, torch.tensor([0, 1, 0]), patch_size=8)), _pixels(image)
    mean = torch.cat([before[:, :8], before[:, 16:]]).float().mean(dim=(0, 1)).round().byte()
    assert torch.equal(pixels[4, 3], mean) and torch.equal(pixels[4, 20], mean)
    assert torch.equal(pixels[:, 8:16], before[:, 8:16])


def test_the_picture_keeps_the_size_of_the_image_where_patches_do_not_divide_it() -> None:
    assert draw_groups(_noise(30, 20), torch.arange(6), patch_size=8, grid=(2, 3)).size == (30, 20)
    assert draw_groups(_noise(30, 20).convert("L"), torch.arange(6), patch_size=8).mode == "RGB"


def test_a_group_of_a_clip_has_one_colour_in_all_frames() -> None:
    frames = [_noise(24, 16) for _ in range(3)]
    groups = torch.arange(18).view(3, 6)
    # the first patch of the first frame and the last of the third are one token
    groups[2, 5] = groups[0, 0]
    first, second, third = draw_clip(frames, groups.flatten(), grid=(3, 2, 3), patch_size=8)
    assert second.tobytes() == frames[1].tobytes()
    inside = [_pixels(first)[1:7, 1:7], _pixels(third)[9:15, 17:23]]
    members = torch.cat([_pixels(frames[0])[:8, :8], _pixels(frames[2])[8:, 16:]]).float()
    assert torch.equal(inside[0], inside[1])
    assert torch.equal(inside[0], members.mean(dim=(0, 1)).round().byte().expand_as(inside[0]))
    with pytest.raises(DataError, match="3 frames do not fit tubelets of 2 times"):
        draw_clip(frames, groups.flatten(), grid=(2, 3, 3), patch_size=8)


@pytest.mark.parametrize("options", [{}, {"grid": (2, 2)}], ids=["from-the-image", "grid"])
def test_a_wrong_patch_count(options: dict[str, Any]) -> None:
    shape = "2 x 3" if not options else "2 x 2"
    with pytest.raises(DataError, match=rf"5 patches do not fit an image of {shape} patches of 8"):
        draw_groups(_noise(24, 16), torch.arange(5), patch_size=8, **options)


def test_sheet_places_every_image_below_its_label() -> None:
    colours = [["red", "lime"], ["blue", "black"], ["yellow", "cyan"]]
    page = sheet(
        [[Image.new("RGB", (4, 4), colour) for colour in line] for line in colours], ["a", "b"], side=20, gap=5
    )
    assert page.size == (2 * 25 + 5, 24 + 3 * 25 + 5)
    for row, line in enumerate(colours):
        for column, colour in enumerate(line):
            left, top = 5 + 25 * column, 24 + 5 + 25 * row
            cell = page.crop((left, top, left + 20, top + 20))
            assert cell.tobytes() == Image.new("RGB", (20, 20), colour).tobytes()
            assert page.getpixel((left - 1, top)) == page.getpixel((left, top - 1)) == (255, 255, 255)
    header = _pixels(page)[:24]
    assert header[:, :27].min() < 128 and header[:, 30:].min() < 128, "no label is written"


@pytest.mark.parametrize("has_bound", [True, False])
def test_plot_is_a_png(tmp_path: Path, has_bound: bool) -> None:
    from matplotlib import pyplot

    rows = ROWS if has_bound else [{k: v for k, v in row.items() if k != "bound images/s"} for row in ROWS]
    plot_tradeoff(tmp_path / "plot.png", rows, "a title")
    with Image.open(tmp_path / "plot.png") as image:
        assert image.format == "PNG" and image.width > image.height > 300
        assert image.convert("L").getextrema() < (100, 256)
    assert pyplot.get_fignums() == [], "the figure stays in memory"


def test_no_name_of_the_plot_covers_another_or_leaves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib import pyplot
    from matplotlib.text import Text

    drawn: list[Any] = []
    figures = ((0, 330.0, 91.4), (4, 331.0, 91.4), (8, 400.0, 91.0), (16, 640.0, 89.8))
    rows = [{"r": str(r), "images/s": s, "top-1 %": t, "top-1 ±": 1.2, "bound images/s": s + 9} for r, s, t in figures]
    with monkeypatch.context() as patch:
        patch.setattr(pyplot, "close", drawn.append)
        plot_tradeoff([tmp_path / f"plot.{kind}" for kind in ("png", "svg", "pdf")], rows, "a title")
    pyplot.close(drawn[0])
    (axes,) = drawn[0].axes
    boxes, panel = [Text.get_window_extent(text) for text in axes.texts], axes.get_window_extent()
    assert [text.get_text() for text in axes.texts] == ["r = 0", "r = 4", "r = 8", "r = 16"]
    assert all(panel.x0 <= box.x0 and box.x1 <= panel.x1 for box in boxes)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all((tmp_path / f"plot.{kind}").stat().st_size > 5_000 for kind in ("png", "svg", "pdf"))


@pytest.mark.parametrize(
    ("module", "call", "text"),
    [
        ("matplotlib", lambda: plot_tradeoff("plot.png", ROWS, ""), r'plots need matplotlib: pip install "tokenm'),
        ("PIL", lambda: draw_groups(None, torch.zeros(1)), r'pictures need Pillow: pip install "tokenmerge\[viz\]"'),
        ("PIL", lambda: sheet([], []), r'pictures need Pillow: pip install "tokenmerge\[viz\]"'),
    ],
    ids=["plot", "groups", "sheet"],
)
def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, module: str, call: Any, text: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UnsupportedError, match=text):
        call()


def test_dropped_patches_are_black() -> None:
    drawn = draw_groups(Image.new("RGB", (8, 8), "white"), torch.tensor([0, 1, -1, -1]), patch_size=4)
    assert drawn.getpixel((1, 1)) == (255, 255, 255) and drawn.getpixel((1, 6)) == drawn.getpixel((6, 6)) == (0, 0, 0)


def test_features_of_a_photograph_have_its_resolution_and_their_groups_colours() -> None:
    data = pytest.importorskip("skimage.data", reason="photographs need scikit-image")
    import timm

    import tokenmerge

    photo = Image.fromarray(data.chelsea())
    pixels = _pixels(photo.resize((112, 112))).permute(2, 0, 1)[None].float() / 127.5 - 1
    model = timm.create_model("vit_small_patch14_reg4_dinov2", img_size=112, depth=3, num_classes=0).eval()
    maps = []
    for r in (0, 12):
        with tokenmerge.patched(model, r=r, restore="dense", track=True) as handle, torch.no_grad():
            maps.append(model.get_intermediate_layers(pixels, n=1, reshape=True)[0][0])
            groups = handle.groups[-1][0, 5:]
    assert maps[1].shape == (384, 8, 8)
    for group in groups.unique():
        members = maps[1].flatten(1)[:, groups == group]
        assert torch.equal(members, members[:, :1].expand_as(members))
    plain, merged = draw_features(maps, photo.size)
    assert plain.size == merged.size == photo.size == (451, 300)
    difference = (_pixels(plain).float() - _pixels(merged).float()).abs().mean()
    assert 0 < difference < 0.5 * _pixels(plain).float().std(), "the restored picture is another one"


def test_feature_maps_of_different_shapes_are_refused() -> None:
    with pytest.raises(DataError, match=r"expected maps of one shape .* got \[\(8, 4, 4\), \(8, 5, 4\)\]"):
        draw_features([torch.zeros(8, 4, 4), torch.zeros(8, 5, 4)], (10, 10))
