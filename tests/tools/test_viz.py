"""`tokenmerge.visualize` and `tokenmerge viz`: what is drawn is what the handle says, and bad input changes nothing."""

from __future__ import annotations

import json
import struct
import wave
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageSequence

import tokenmerge
from helpers import assert_close, randomised, tiny_vit
from tokenmerge.cli import main
from tokenmerge.data.prepare import find_preprocessing
from tokenmerge.data.preprocessing import Preprocessing
from tokenmerge.errors import DataError, NotPatchedError, UnknownNameError, UnsupportedError
from tokenmerge.importance import class_attention
from tokenmerge.testing.models.drawn import tiny_vit as drawn
from tokenmerge.tools.visualize import draw_groups, draw_values, grid_of, look
from tokenmerge.tools.viz import RECORD, viz

Capture = pytest.CaptureFixture[str]


def photo(seed: int = 0, size: tuple[int, int] = (180, 140)) -> Any:
    generator = torch.Generator().manual_seed(seed)
    small = torch.randint(0, 256, (7, 9, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(small.numpy()).resize(size, Image.BICUBIC)


def vit(**options: Any) -> Any:
    torch.manual_seed(0)
    return drawn(**options) if options else tiny_vit()


def groups_of(handle: Any, x: torch.Tensor) -> list[torch.Tensor]:
    handle.track = True
    with torch.no_grad():
        handle.model(x)
    found = [groups[0, handle.prefix :] for groups in handle.groups]
    handle.track = False
    return found


@pytest.mark.parametrize(
    ("options", "size"),
    [({}, (320, 200)), ({"img_size": (24, 40)}, (300, 260)), ({"patch_size": 8, "img_size": 64}, (150, 310))],
    ids=["square", "wide", "large patches"],
)
def test_the_picture_is_the_photo_with_the_groups_of_the_handle(options: dict[str, Any], size: tuple[int, int]) -> None:
    model, image = vit(**options), photo(size=size)
    model.pretrained_cfg = {"input_size": (3, *model.patch_embed.img_size), "mean": (0.4,) * 3, "std": (0.3,) * 3}
    prepared = find_preprocessing(model)
    H, W = prepared.size[1:]
    with tokenmerge.patch(model, r=8) as handle:
        expected = groups_of(handle, prepared(image)[None])
        picture = tokenmerge.visualize(handle, image, block=1)
        assert picture.size == size and handle.track is False and handle.tokens[-1] < handle.tokens[0]
        seen = look(handle, image, prepared)
        assert all(torch.equal(a, b) for a, b in zip(seen.groups, expected, strict=True))
        by_hand = draw_groups(image, expected[1], grid=handle.grid, box=seen.box)
        assert picture.tobytes() == by_hand.tobytes() != image.tobytes()
        # the middle of the photo, in the shape of the model's input and as large as it fits, but for its crop
        assert seen.is_own and seen.box is not None
        left, top, right, bottom = seen.box
        scale = min(size[0] / W, size[1] / H)
        assert right - left == pytest.approx(0.875 * scale * W, rel=0.05)
        assert bottom - top == pytest.approx(0.875 * scale * H, rel=0.05)
        assert left + right == pytest.approx(size[0], abs=0.06 * size[0])
        assert top + bottom == pytest.approx(size[1], abs=0.06 * size[1])
        cut = tokenmerge.visualize(handle, image, block=1, cut=True)
        assert abs(cut.width - (right - left)) <= 1 and abs(cut.height - (bottom - top)) <= 1


def test_without_merging_it_is_the_photo() -> None:
    image = photo(size=(96, 96))
    with tokenmerge.patch(vit(), r=0) as handle:
        cut = tokenmerge.visualize(handle, image, cut=True)
        whole = tokenmerge.visualize(handle, image)
    x = (96 - cut.width) // 2
    inside = np.asarray(image.crop((x, x, x + cut.width, x + cut.width)))
    assert np.array_equal(np.asarray(cut), inside) and whole.size == (96, 96)
    assert np.array_equal(np.asarray(whole)[x : x + cut.width, x : x + cut.width], inside)


def test_two_runs_draw_the_same() -> None:
    for show in ("groups", "size", "similarity", "attention"):
        pictures = [tokenmerge.visualize(tokenmerge.patch(vit(), r=8), photo(), show=show).tobytes() for _ in range(2)]
        assert pictures[0] == pictures[1]


def test_the_grid_is_that_of_the_input_not_of_as_many_patches() -> None:
    torch.manual_seed(0)
    model = randomised(timm.create_model("vit_tiny_patch16_224", depth=2, dynamic_img_size=True)).eval()
    with tokenmerge.patch(model, r=4) as handle:
        assert grid_of(handle, (224, 224), 196) == (14, 14)
        assert grid_of(handle, (112, 448), 196) == (7, 28), "as many patches, in other rows"
        assert grid_of(handle, (112, 448), 195) is None
        image = photo(size=(448, 112))
        steps = Preprocessing((3, 112, 448), (112, 448), False, "bicubic", (0.5,) * 3, (0.5,) * 3, "test")
        seen = look(handle, image, steps)
        assert seen.grid == (7, 28) and seen.is_own and seen.box == (0, 0, 448, 112)


def test_naflex_in_the_shape_of_the_photo() -> None:
    pytest.importorskip("timm.models.naflexvit")
    from tokenmerge.adapters import ADAPTERS

    model, _ = next(adapter for adapter in ADAPTERS if adapter.name == "timm_naflex").tiny()
    steps = Preprocessing((3, 16, 64), (16, 64), False, "bicubic", (0.5,) * 3, (0.5,) * 3, "test")
    with tokenmerge.patch(randomised(model), r=3) as handle:
        expected = groups_of(handle, steps(photo())[None])
        seen = look(handle, photo(size=(256, 64)), steps)
        assert seen.grid == (2, 8) and len(seen.groups[0]) == len(expected[0]) == 16
        assert tokenmerge.visualize(handle, photo(size=(256, 64)), preprocessing=steps).size == (256, 64)


def _sam() -> Any:
    from tokenmerge.adapters import ADAPTERS

    model, x = next(adapter for adapter in ADAPTERS if adapter.name == "timm_sam").tiny()
    return randomised(model), x


def test_windows_are_drawn_as_their_attention_saw_them() -> None:
    from timm.models.vision_transformer_sam import window_unpartition

    model, x = _sam()
    outs: list[torch.Tensor] = []
    for block in model.blocks:
        block.attn.register_forward_hook(lambda module, args, out: outs.append(out))
    with tokenmerge.patch(model, r=3, track=True) as handle, torch.no_grad():
        model(x)
        assert [len(groups.unique()) for groups in handle.groups] == [64] * 4
        for block, out, found in zip(model.blocks, outs, handle.windows, strict=True):
            assert found is not None and found.shape == (2, 64)
            side = block.window_size
            whole = window_unpartition(out, side, (8, 8), (9, 9)) if side else out
            whole = whole.flatten(1, 2)
            for image in range(2):
                for group in found[image].unique():
                    members = (found[image] == group).nonzero().flatten()
                    assert_close(whole[image, members], whole[image, members[:1]].expand(len(members), -1), 1e-5)
                    if side:
                        windows = {(int(at) // 8 // side, int(at) % 8 // side) for at in members}
                        assert len(windows) == 1, "a group of two windows"
            if not side:
                assert [len(one.unique()) for one in found] == [61, 61]
        handle.r = [0, 3, 0, 0]
        model(x)
        assert [found is None for found in handle.windows] == [True, False, True, True]
    with tokenmerge.patch(model, r=3) as handle:
        steps = lambda image: x[0]  # noqa: E731
        seen = look(handle, photo(), find_preprocessing(model, given=steps))
        assert seen.inside and seen.grid == (8, 8) and not seen.is_own
        picture = tokenmerge.visualize(handle, photo(), block=1, preprocessing=steps)
        assert picture.size == (64, 64), "patches of 4 pixels are drawn twice as large"
        with pytest.raises(UnsupportedError, match="hand on all their tokens"):
            tokenmerge.visualize(handle, photo(), show="similarity", preprocessing=steps)


@pytest.mark.parametrize("r", [8, [0, 8, 0, 4]], ids=["constant", "not in every block"])
def test_the_class_tokens_attention_is_that_of_each_block(r: Any) -> None:
    model, image = vit(), photo()
    prepared = find_preprocessing(model)
    x = prepared(image)[None]
    with tokenmerge.patch(model, r=r) as handle:
        seen = look(handle, image, prepared, shows=("attention",))
        groups = groups_of(handle, x)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        assert handle.config.r == r and handle.config.method == tokenmerge.ToMe()
    assert seen.attention is not None
    for block, share in enumerate(seen.attention):
        assert share.shape == (64,) and abs(float(share.sum()) - 1) < 1e-5
        if block:
            for group in groups[block - 1].unique():
                assert len(share[groups[block - 1] == group].unique()) == 1
    # the first block sees every patch: by hand
    kept: list[torch.Tensor] = []
    attn = model.blocks[0].attn
    hook = attn.register_forward_hook(lambda module, args, out: kept.append(args[0]))
    with torch.no_grad():
        model(x)
    hook.remove()
    q, k, _ = attn.qkv(kept[0]).view(1, 65, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    row = class_attention(attn.q_norm(q), attn.k_norm(k))[0].mean(dim=0)[1:]
    assert_close(seen.attention[0], (row / row.sum()).detach(), 1e-5)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_values_are_drawn_where_their_patches_are() -> None:
    model, image = vit(), photo(size=(64, 64))
    steps = Preprocessing((3, 32, 32), (32, 32), False, "bicubic", (0.5,) * 3, (0.5,) * 3, "test")
    with tokenmerge.patch(model, r=8) as handle:
        groups = groups_of(handle, steps(image)[None])[-1]
        sizes = torch.tensor([float((groups == group).sum()) for group in groups])
        picture = tokenmerge.visualize(handle, image, show="size", preprocessing=steps)
        by_hand = draw_values(image, sizes.log2(), grid=(8, 8), low=0, high=float(sizes.max().log2()))
        assert picture.crop((0, 0, 64, 64)).tobytes() == by_hand.tobytes() and picture.height > 64


def test_what_a_model_or_method_has_not_is_said() -> None:
    image = photo()
    handle = tokenmerge.patch(vit(class_token=False, global_pool="avg"), r=8)
    with pytest.raises(UnsupportedError, match="no class token"):
        tokenmerge.visualize(handle, image, show="attention")
    with tokenmerge.patch(vit(), "tokenlearner(weights='new')", r=8) as handle:
        with pytest.raises(UnsupportedError, match="tokenlearner, which has modules"):
            tokenmerge.visualize(handle, image, show="attention")
        with pytest.raises(UnsupportedError, match="mixes tokens"):
            tokenmerge.visualize(handle, image, show="similarity")
        assert handle.track is False
    with tokenmerge.patch(vit(), r=8) as handle:
        for block, said in ((4, r"5 \(number 4 from 0\)"), (-5, "-5")):
            with pytest.raises(DataError, match=rf"no block {said}: this model has 4\."):
                tokenmerge.visualize(handle, image, block=block)
        with pytest.raises(UnknownNameError, match="groups"):
            tokenmerge.visualize(handle, image, show="group")
        tokenmerge.visualize(handle, image)
    with pytest.raises(NotPatchedError, match="taken out of its model"):
        tokenmerge.visualize(handle, image)


@pytest.mark.parametrize("method", ["tofu", "evit", "attention", "atm", "diffrate"])
def test_other_methods_are_drawn_too(method: str) -> None:
    with tokenmerge.patch(vit(), method, r=6) as handle:
        for show in ("groups", "size", "attention"):
            assert tokenmerge.visualize(handle, photo(), show=show).width == 180
        expected = groups_of(handle, find_preprocessing(handle.model)(photo())[None])
        seen = look(handle, photo(), find_preprocessing(handle.model))
        assert torch.equal(seen.groups[-1], expected[-1])


def test_a_model_without_a_grid_is_drawn_as_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenmerge.tools import visualize as tool

    monkeypatch.setattr(tool, "grid_of", lambda *_: None)
    found = viz(vit(), photo(), tmp_path / "out", r=8)
    assert any("no grid of patches for image 1" in note for note in found.notes)
    with Image.open(tmp_path / "out" / "image-1-groups-04.png") as picture:
        assert picture.size == (8 * 24, 8 * 24)


# --- files ---


def _saved(folder: Path) -> list[str]:
    photo(0).save(folder / "a b.png")
    photo(1, (120, 160)).save(folder / "b.jpg")
    return [str(folder / "a b.png"), str(folder / "b.jpg")]


def test_files_of_photos(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    found = viz(vit(), _saved(tmp_path), out, r=8, block=[0, -1], shows=["groups", "size"])
    names = [
        f"{photo}-{show}{block}.png"
        for photo in ("a-b", "b")
        for show in ("groups", "size")
        for block in ("-01", "-04", "")
    ]
    names += ["all-groups.png", "all-size.png", RECORD]
    assert sorted(found.files) == sorted(names) == sorted(path.name for path in out.iterdir())
    record = json.loads((out / RECORD).read_text())
    assert record["rows"] == found.rows and [row["file"] for row in found.rows] == ["a b.png", "b.jpg"]
    with tokenmerge.patch(vit(), r=8) as handle:
        picture = tokenmerge.visualize(handle, tmp_path / "b.jpg", block=0)
        with Image.open(out / "b-groups-01.png") as written:
            assert written.tobytes() == picture.tobytes() and written.size == (120, 160)
        groups = groups_of(handle, find_preprocessing(handle.model)(photo(0))[None])[-1]
    largest = int(groups.unique(return_counts=True)[1].max())
    assert found.rows[0] == {
        "file": "a b.png",
        "patches": 64,
        "after block": 4,
        "groups": len(groups.unique()),
        "largest group": largest,
        "dropped": 0,
    }


def test_no_file_is_written_twice(tmp_path: Path) -> None:
    sources = [tmp_path / name for name in ("a/x.png", "b/x.png", "x-1.png", "all.png")]
    for number, source in enumerate(sources):
        source.parent.mkdir(exist_ok=True)
        photo(number).save(source)
    found = viz(vit(), sources, tmp_path / "out", r=8, block=[0, -1])
    assert len({*found.files}) == len(found.files) == 4 * 3 + 2
    drawn_twice = {(tmp_path / "out" / name).read_bytes() for name in found.files if name.endswith("-04.png")}
    assert len(drawn_twice) == 4, "one photo's picture has another's name"


def test_a_name_that_is_too_long_for_a_file_is_said(tmp_path: Path) -> None:
    long = tmp_path / f"{'x' * 250}.png"
    photo().save(long)
    with pytest.raises(DataError, match=r"cannot write to .*out: File name too long"):
        viz(vit(), long, tmp_path / "out", r=8)
    assert not (tmp_path / "out").exists()


def test_an_existing_output_is_refused_and_replaced_when_asked(tmp_path: Path) -> None:
    source = _saved(tmp_path)[1]
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    (out / "b-groups-04.png").write_text("old")
    with pytest.raises(DataError, match=r"b-groups-04.png exists already: give another folder \(-o\), or --force"):
        viz(vit(), source, out, r=8)
    assert (out / "b-groups-04.png").read_text() == "old" and len([*out.iterdir()]) == 2
    viz(vit(), source, out, r=8, force=True)
    with Image.open(out / "b-groups-04.png") as picture:
        assert picture.size == (120, 160)
    assert (out / "mine.txt").read_text() == "mine" and (out / RECORD).exists()
    with pytest.raises(DataError, match=r"viz.json exists already"):
        viz(vit(), source, out, r=8, block=0)


def test_bad_input_is_refused_before_a_file_is_touched(tmp_path: Path) -> None:
    source = _saved(tmp_path)[0]
    (tmp_path / "bad.png").write_text("no image")
    (tmp_path / "file").touch()
    for error, says, options in (
        (DataError, "cannot read the image .*bad.png", {"sources": [source, tmp_path / "bad.png"]}),
        (DataError, "cannot read the image .*none.jpg", {"sources": tmp_path / "none.jpg"}),
        (DataError, "nothing to draw", {"sources": []}),
        (DataError, r"no block 5 \(number 4 from 0\): this model has 4", {"block": 4}),
        (DataError, "no block", {"block": []}),
        (DataError, "at least 1 frame", {"frames": 0}),
        (DataError, "mp4 or gif, not as avi", {"video": "avi"}),
        (UnknownNameError, "tomee", {"method": "tomee"}),
        (UnknownNameError, "sizes", {"shows": ["sizes"]}),
        (tokenmerge.TokenMergeError, "-3", {"r": -3}),
        (DataError, "cannot write to .*file/x: Not a directory", {"folder": tmp_path / "file" / "x"}),
        (DataError, "cannot write to .*file: Not a directory", {"folder": tmp_path / "file"}),
        (DataError, "cannot write to /proc/x", {"folder": "/proc/x"}),
    ):
        arguments: dict[str, Any] = {"sources": source, "folder": tmp_path / "out", **options}
        with pytest.raises(error, match=says):
            viz(vit(), **arguments)
        assert not (tmp_path / "out").exists() and not [*tmp_path.glob(".part*")]


def test_every_kind_of_photo_is_drawn(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    photo().save(tmp_path / "turned.jpg", exif=exif)
    photo().convert("CMYK").save(tmp_path / "cmyk.jpg")
    photo().convert("P").save(tmp_path / "palette.gif")
    Image.fromarray(np.arange(25200, dtype=np.uint16).reshape(140, 180) * 2).save(tmp_path / "deep.png")
    clear = photo().convert("RGBA")
    clear.putalpha(0)
    clear.save(tmp_path / "clear.png")
    Image.new("RGB", (1, 1), "red").save(tmp_path / "pixel.png")
    Image.new("L", (20_000, 500), 9).save(tmp_path / "long.png")
    names = ["turned.jpg", "cmyk.jpg", "palette.gif", "deep.png", "clear.png", "pixel.png", "long.png"]
    found = viz(vit(), [tmp_path / name for name in names], tmp_path / "out", r=8)
    sizes = {}
    for name in names:
        with Image.open(tmp_path / "out" / f"{Path(name).stem}-groups-04.png") as picture:
            sizes[name] = picture.size
            if name == "clear.png":
                assert picture.getpixel((2, 2)) == (255, 255, 255)
    assert sizes["turned.jpg"] == (140, 180) and sizes["cmyk.jpg"] == sizes["deep.png"] == (180, 140)
    assert sizes["long.png"] == (20_000, 500) and sizes["pixel.png"][0] == sizes["pixel.png"][1] >= 64
    assert len(found.rows) == 7
    with pytest.raises(DataError, match="20000 x 20 pixels: of so narrow"):
        viz(vit(), Image.new("L", (20_000, 20)), tmp_path / "other")


def test_an_untrained_model_is_said_to_be_one(tmp_path: Path) -> None:
    fresh = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)
    assert any("untrained" in note for note in viz(fresh, photo(), tmp_path / "a", r=1).notes)
    assert not any("untrained" in note for note in viz(vit(), photo(), tmp_path / "b", r=1).notes)
    assert not tokenmerge.handle_of(fresh, None)


def test_auto_is_chosen_on_the_first_photo(tmp_path: Path) -> None:
    found = viz(vit(), photo(), tmp_path / "out", r=8, method="auto")
    assert found.rows[0]["groups"] < 64


# --- videos ---


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return write_clip(tmp_path / "clip.mp4")


def write_clip(path: Path, count: int = 20, size: tuple[int, int] = (128, 96)) -> Path:
    """A square that moves to the right."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for t in range(count):
            frame = np.zeros((size[1], size[0], 3), np.uint8)
            frame[20:60, 4 * t : 4 * t + 32] = (200, 60, 0)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def read_back(path: Path) -> tuple[np.ndarray, float]:
    av = pytest.importorskip("av")
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        return np.stack(frames), float(container.streams.video[0].average_rate)


def test_a_video_is_given_to_an_image_model_frame_by_frame(tmp_path: Path, clip: Path) -> None:
    found = viz(vit(), clip, tmp_path / "out", r=8, frames=5)
    assert sorted(found.files) == ["clip-groups-04.mp4", "clip-strip-04.png", RECORD]
    frames, rate = read_back(tmp_path / "out" / "clip-groups-04.mp4")
    assert frames.shape == (5, 96, 128, 3) and rate == pytest.approx(2.5)
    # each is the picture of that frame: the same groups, in other colours at the edges alone
    from tokenmerge.data.clips import read_film

    film = read_film(clip, 5)
    assert film.places == [2, 6, 10, 14, 18] and film.rate == 10
    with tokenmerge.patch(vit(), r=8) as handle:
        for frame, written in zip(film.frames, frames, strict=True):
            alone = np.asarray(tokenmerge.visualize(handle, Image.fromarray(frame.numpy())), float)
            assert np.median(np.abs(alone - written)) < 6
    assert found.facts[0] == "clip.mp4: 5 frames, each given to the model by itself."


def test_a_gif_and_a_video_of_odd_sides(tmp_path: Path, clip: Path) -> None:
    viz(vit(), clip, tmp_path / "gif", r=8, frames=4, video="gif")
    with Image.open(tmp_path / "gif" / "clip-groups-04.gif") as gif:
        frames = [frame.convert("RGB").copy() for frame in ImageSequence.Iterator(gif)]
        assert len(frames) == 4 and gif.size == (128, 96) and gif.info["duration"] == 500
    assert all(a.tobytes() != b.tobytes() for a, b in pairwise(frames))
    viz(vit(), clip, tmp_path / "cut", r=8, frames=2, cut=True)
    written, _ = read_back(tmp_path / "cut" / "clip-groups-04.mp4")
    assert written.shape[1] % 2 == written.shape[2] % 2 == 0


def test_a_model_of_clips_groups_over_frames(tmp_path: Path, clip: Path) -> None:
    pytest.importorskip("transformers")
    from tokenmerge.adapters import ADAPTERS

    torch.manual_seed(0)
    model, _ = next(adapter for adapter in ADAPTERS if adapter.name == "hf_videomae").tiny()
    found = viz(randomised(model), clip, tmp_path / "out", r=2)
    frames, rate = read_back(tmp_path / "out" / "clip-groups-04.mp4")
    tubelet = model.config.tubelet_size
    assert len(frames) == 8 // tubelet and rate == pytest.approx(10 / 20 * 8 / tubelet, rel=0.2)
    assert found.rows[0]["patches"] == 8 // tubelet * 4 and found.rows[0]["groups"] < found.rows[0]["patches"]
    assert "tubelets of" in found.facts[0] and any("no preprocessor_config.json" in note for note in found.notes)
    with pytest.raises(DataError, match=r"has 3 frames, and the model takes clips of 8"):
        viz(model, write_clip(tmp_path / "short.mp4", 3), tmp_path / "other", r=2)


def test_a_clip_whose_crop_is_not_known_is_drawn_as_the_model_is_given_it(tmp_path: Path, clip: Path) -> None:
    pytest.importorskip("transformers")
    from tokenmerge.adapters import ADAPTERS

    torch.manual_seed(0)
    model, x = next(adapter for adapter in ADAPTERS if adapter.name == "hf_videomae").tiny()

    def negative(image: Any) -> torch.Tensor:
        pixels = np.asarray(image.convert("RGB").resize(x.shape[:-3:-1]))
        return 1 - torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255

    found = viz(randomised(model), clip, tmp_path / "out", r=2, preprocessing=negative)
    frames, _ = read_back(tmp_path / "out" / "clip-groups-04.mp4")
    assert frames.shape[1:3] == x.shape[-2:], "groups are drawn over what the model did not see"
    note = "clip.mp4 is drawn as the model is given it: which part of the photo that is, is not known."
    assert note in found.notes


def test_a_fast_gif_is_one_that_browsers_play(tmp_path: Path) -> None:
    from tokenmerge.tools.viz_clip import write_film

    write_film(tmp_path / "x.gif", [photo(0), photo(1)], 240.0)
    with Image.open(tmp_path / "x.gif") as gif:
        assert gif.info["duration"] == 20  # of less they make 100


def _turned(path: Path) -> None:
    """Write into a film that it is seen turned by 90 degrees with the clock, as phones do."""
    plain = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    turned = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    content = path.read_bytes()
    at = content.index(plain, content.index(b"tkhd"))
    path.write_bytes(content[:at] + turned + content[at + 36 :])


def test_a_video_is_turned_as_it_says(clip: Path) -> None:
    from tokenmerge.data.clips import read_film

    before = read_film(clip, 1).frames[0]
    _turned(clip)
    after = read_film(clip, 1).frames[0]
    assert after.shape == (128, 96, 3) and torch.equal(after, torch.rot90(before, -1, (0, 1)))


def test_videos_that_cannot_be_read_are_refused(tmp_path: Path, clip: Path) -> None:
    content = clip.read_bytes()
    for name, part in (("half.mp4", content[: len(content) // 2]), ("text.mp4", b"no video"), ("empty.mp4", b"")):
        (tmp_path / name).write_bytes(part)
        with pytest.raises(DataError, match=f"cannot read the video .*{name}"):
            viz(vit(), tmp_path / name, tmp_path / "out", r=8)
    # the list of frames in front, and half of them
    av = pytest.importorskip("av")
    with av.open(str(clip)) as source, av.open(str(tmp_path / "x.mp4"), "w", options={"movflags": "faststart"}) as copy:
        stream = copy.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                copy.mux(packet)
    content = (tmp_path / "x.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(content[: -len(content) // 4])
    with pytest.raises(DataError, match=r"cannot read the video .*cut.mp4"):
        viz(vit(), tmp_path / "cut.mp4", tmp_path / "out", r=8)
    with pytest.raises(UnsupportedError, match="of videos the groups are drawn, not size"):
        viz(vit(), clip, tmp_path / "out", r=8, shows=["size"])
    assert not (tmp_path / "out").exists()


# --- sounds ---


def write_tone(path: Path, seconds: float = 1.0, rate: int = 8_000) -> Path:
    t = np.arange(int(seconds * rate)) / rate
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((20_000 * np.sin(2 * np.pi * (300 + 500 * t) * t)).astype(np.int16).tobytes())
    return path


def _drawn_sounds(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    from tokenmerge.tools import viz_sound

    calls: list[dict[str, Any]] = []
    plot = viz_sound.plot_groups

    def noted(path: Path, level: torch.Tensor, groups: torch.Tensor, grid: Any, **options: Any) -> None:
        calls.append({"level": level, "groups": groups, "grid": grid, **options})
        plot(path, level, groups, grid, **options)

    monkeypatch.setattr(viz_sound, "plot_groups", noted)
    return calls


def test_a_sound_is_drawn_on_its_spectrogram(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _drawn_sounds(monkeypatch)
    tone = write_tone(tmp_path / "tone.wav")
    model = vit(img_size=(32, 64), in_chans=1)
    found = viz(model, tone, tmp_path / "out", r=8, block=[0, 3])
    assert sorted(found.files) == ["tone-groups-01.png", "tone-groups-04.png", RECORD]
    with Image.open(tmp_path / "out" / "tone-groups-04.png") as picture:
        assert picture.size == (1200, 720)
    first = calls[0]
    assert first["grid"] == (8, 16) and first["level"].shape == (32, 64) and len(first["hertz"]) == 32
    # 2 s, with the sound in their middle; the tone's frequency is where the axis says
    assert (first["start"], first["seconds"]) == (-0.5, 2.0)
    at = int((0.25 - first["start"]) / 2.0 * 64)
    loudest = float(first["hertz"][first["level"][:, at].argmax()])
    assert abs(loudest - (300 + 2 * 500 * 0.25)) < 80
    assert found.facts == ["tone.wav: as tokenmerge train prepares sounds."]
    found = viz(model, write_tone(tmp_path / "long.wav", seconds=3.5), tmp_path / "long", r=8)
    said = "long.wav: as tokenmerge train prepares sounds; the model is given the middle 2.0 of its 3.5 s."
    assert found.facts == [said] and calls[-1]["start"] == 0.75


@pytest.mark.parametrize("name", ["hf_ast", "hf_whisper"])
def test_sounds_for_models_of_transformers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    from tokenmerge.adapters import ADAPTERS

    calls = _drawn_sounds(monkeypatch)
    tone = write_tone(tmp_path / "tone.wav", seconds=0.2)
    torch.manual_seed(0)
    model, _ = next(adapter for adapter in ADAPTERS if adapter.name == name).tiny()
    found = viz(randomised(model), tone, tmp_path / "out", r=2)
    (call,) = calls
    assert call["grid"][0] * call["grid"][1] == found.rows[0]["patches"] == len(call["groups"])
    assert call["start"] == 0 and call["seconds"] == pytest.approx(call["level"].shape[1] * 0.01)
    assert call["end"] == pytest.approx(0.2) and all(a < b for a, b in pairwise(call["hertz"].tolist()))
    assert call["hertz"][0] > 0 and call["hertz"][-1] < 8_000
    loudest = float(call["hertz"][call["level"][:, 8].argmax()])
    step = float((call["hertz"][1:] - call["hertz"][:-1]).max())
    assert abs(loudest - 380) < max(200.0, step)
    assert found.rows[0]["groups"] < found.rows[0]["patches"] and "the model is given" not in found.facts[0]
    whole = call["seconds"]
    found = viz(model, write_tone(tmp_path / "long.wav", seconds=whole + 1), tmp_path / "long", r=2)
    assert f"; the model is given the first {whole:.1f} of its {whole + 1:.1f} s." in found.facts[0]


def test_sounds_that_cannot_be_drawn_are_refused(tmp_path: Path) -> None:
    tone = write_tone(tmp_path / "tone.wav")
    with pytest.raises(UnsupportedError, match=r"tone.wav is a sound, and this VisionTransformer takes \(3, 32, 32\)"):
        viz(vit(), tone, tmp_path / "out", r=8)
    (tmp_path / "bad.wav").write_bytes(b"RIFF")
    with pytest.raises(DataError, match=r"cannot read the sound .*bad.wav"):
        viz(vit(img_size=(32, 64), in_chans=1), tmp_path / "bad.wav", tmp_path / "out", r=8)
    for name, count, cut in (("cut", 1, -1000), ("odd", 2, -2)):
        with wave.open(str(tmp_path / f"{name}.wav"), "wb") as file:
            file.setparams((count, 2, 8_000, 0, "NONE", ""))
            file.writeframes(b"\1\2" * 8_000)
        (tmp_path / f"{name}.wav").write_bytes((tmp_path / f"{name}.wav").read_bytes()[:cut])
        with pytest.raises(DataError, match=rf"cannot read the sound .*{name}.wav: it is cut off: \d+ of \d+ samples"):
            viz(vit(img_size=(32, 64), in_chans=1), tmp_path / f"{name}.wav", tmp_path / "out", r=8)
    with pytest.raises(UnsupportedError, match="of sounds the groups are drawn, not attention"):
        viz(vit(img_size=(32, 64), in_chans=1), tone, tmp_path / "out", r=8, shows=["attention"])
    assert not (tmp_path / "out").exists()


# --- the command ---


def test_the_command(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _saved(tmp_path)
    command = ["viz", "a b.png", "-m", "reference", "-r", "16", "--block", "1", "-1", "--show", "groups", "similarity"]
    assert main(command) == 0
    said = capsys.readouterr()
    assert (
        "a b.png" in said.out
        and "Preprocessing: " in said.out
        and "Written to tokenmerge-viz: a-b-groups-01.png" in said.err
    )
    assert Path("tokenmerge-viz/a-b-similarity-12.png").exists() and Path("tokenmerge-viz/a-b-groups.png").exists()
    assert main(command) == 2 and "exists already" in capsys.readouterr().err
    assert main([*command, "--force", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["folder"] == "tokenmerge-viz" and content["rows"][0]["after block"] == 12
    for words, says in (
        (["--block", "0"], "counts from 1"),
        (["--block", "x"], "takes numbers, or all; got x"),
        (["--block", "13"], "no block 13 (number 12 from 0): this model has 12."),
        (["-o", "/proc/x"], "cannot write to /proc/x"),
    ):
        assert main([*command[:6], *words]) == 2 and says in capsys.readouterr().err, words


def test_random_weights_are_said(tmp_path: Path, capsys: Capture) -> None:
    photo().save(tmp_path / "a.png")
    words = ["-m", "timm:test_vit", "--no-pretrained", "-r", "2", "-o", str(tmp_path / "out")]
    assert main(["viz", str(tmp_path / "a.png"), *words]) == 0
    assert "Random weights, as asked with --no-pretrained." in capsys.readouterr().out
