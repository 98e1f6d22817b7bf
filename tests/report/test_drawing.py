"""The drawings: every pixel is of the group that its patch is in, whatever the grid; and they look as they did."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_pictures import FOLDER, GROUPS, KINDS, as_tensor, photo, seen, sound
from PIL import Image

from tokenmerge.errors import DataError, UnsupportedError
from tokenmerge.report.drawing import draw_cells, draw_clip, draw_groups, draw_values, shades_of, sheet
from tokenmerge.tools.viz_clip import follow


def _is_alike(picture: Any, golden: Any) -> None:
    assert picture.size == golden.size
    difference = (as_tensor(picture) - as_tensor(golden)).abs()
    # fonts and resampling differ a little between versions
    assert difference.mean() < 3 and (difference.amax(dim=2) > 60).float().mean() < 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_a_drawing_looks_as_it_did(kind: str) -> None:
    picture = KINDS[kind]()
    with Image.open(FOLDER / f"{kind}.png") as golden:
        _is_alike(picture, golden)
    assert KINDS[kind]().tobytes() == picture.tobytes(), "two runs differ"


def test_a_sound_looks_as_it_did(tmp_path: Path) -> None:
    with Image.open(FOLDER / "sound.png") as golden:
        _is_alike(sound(tmp_path / "sound.png"), golden)


def test_every_golden_picture_is_drawn() -> None:
    assert {path.stem for path in FOLDER.glob("*.png")} == {*KINDS, "sound"}


def test_a_golden_picture_would_fail_for_another_drawing() -> None:
    with Image.open(FOLDER / "groups.png") as golden, pytest.raises(AssertionError):
        _is_alike(seen().draw(0), golden)


def _patch_of(at: int, start: float, end: float, count: int) -> int:
    """The row or column that the middle of a pixel lies in; -1: none."""
    found = math.floor((at + 0.5 - start) / (end - start) * count)
    return found if 0 <= found < count else -1


CASES = {
    "whole patches": ((48, 32), (4, 6), None),
    "patches of no whole pixels": ((101, 67), (4, 6), None),
    "tall patches": ((60, 97), (9, 4), None),
    "a part": ((90, 70), (5, 7), (7.3, 4.8, 82.6, 66.1)),
    "beyond the edge": ((40, 40), (4, 4), (-5.0, 0.0, 45.0, 40.0)),
    "a column": ((64, 30), (1, 12), None),
}


@pytest.mark.parametrize("case", CASES)
def test_every_pixel_is_of_the_group_that_its_patch_is_in(case: str) -> None:
    size, (rows, columns), box = CASES[case]
    image = photo(size)
    left, top, right, bottom = box or (0, 0, *size)
    generator = torch.Generator().manual_seed(0)
    groups = torch.randint(-1, rows * columns // 2, (rows * columns,), generator=generator)
    shades = shades_of(groups)
    drawn, before = as_tensor(draw_groups(image, groups, grid=(rows, columns), box=box)), as_tensor(image)
    of = [
        [_patch_of(y, top, bottom, rows), _patch_of(x, left, right, columns)]
        for y in range(size[1])
        for x in range(size[0])
    ]
    place = torch.tensor([-1 if min(row, column) < 0 else row * columns + column for row, column in of]).view(
        size[::-1]
    )
    assert set(range(rows * columns)) <= set(place.flatten().tolist()) or case == "beyond the edge"
    pale = (0.3 * before[place < 0] + 255 * 0.7).round()
    assert (drawn[place < 0] - pale).abs().max() <= 1 if pale.numel() else box is None or case == "beyond the edge"
    edges: dict[int, set[tuple[float, ...]]] = {}
    for group in groups.unique().tolist():
        members = (groups == group).nonzero().flatten()
        inside = torch.isin(place, members)
        found = drawn[inside]
        if group < 0:
            assert found.max() == 0, "what was dropped is black"
        elif len(members) == 1:
            assert torch.equal(found, before[inside]), "a patch of its own keeps its pixels"
        else:
            mean = before[inside].mean(dim=0)
            is_flat = (found - mean).abs().amax(dim=1) <= 0.51
            assert is_flat.float().mean() > 0.3
            edges[int(shades[members[0]])] = {tuple(colour.tolist()) for colour in found[~is_flat]}
    # one edge colour for each group, and another for each of them
    assert all(len(colours) <= 1 for colours in edges.values())
    every = [colour for colours in edges.values() for colour in colours]
    assert len(every) == len(set(every)) > 1


def test_a_group_that_grows_keeps_its_colour() -> None:
    image = Image.new("RGB", (64, 16), "white")
    few, many = (as_tensor(draw_groups(image, torch.tensor(g), grid=(1, 4))) for g in ([9, 1, 1, 2], [9, 1, 1, 1]))
    assert torch.equal(few[8, 16], many[8, 16]) and not torch.equal(few[8, 16], few[8, 20])
    assert shades_of(torch.tensor([7, 3, 3, 7, -1])).tolist() == [0, 1, 1, 0, 4]


def test_a_mean_is_exact_in_a_large_photo() -> None:
    image = Image.new("RGB", (5000, 4000), (255, 254, 3))
    assert draw_groups(image, torch.zeros(4), grid=(2, 2)).getpixel((2500, 100)) == (255, 254, 3)


def test_an_edge_is_wider_in_a_larger_photo() -> None:
    for width, edge in ((64, 1), (640, 10), (6400, 100)):
        drawn = as_tensor(
            draw_groups(Image.new("RGB", (width, width // 4), "white"), torch.tensor([0, 0, 1, 1]), grid=(1, 4))
        )
        line = drawn[0]
        assert int((line != 255).any(dim=1).sum()) == 2 * edge


def test_values_are_colours_between_two_ends() -> None:
    image = photo((32, 16))
    values = torch.tensor([0.0, 1.0, float("nan"), 2.0])
    drawn = as_tensor(draw_values(image, values, grid=(1, 4), low=0.0, high=1.0))
    grey = as_tensor(image).mean(dim=2)
    for patch, colour in ((0, (68, 1, 84)), (1, (253, 231, 37)), (3, (253, 231, 37))):
        part = slice(8 * patch, 8 * patch + 8)
        expected = 0.3 * grey[:, part, None] + 0.7 * torch.tensor(colour)
        assert (drawn[:, part] - expected).abs().max() <= 0.51
    assert (drawn[:, 16:24] - grey[:, 16:24, None]).abs().max() <= 0.51
    with pytest.raises(DataError, match="3 values do not fit 1 x 4 patches"):
        draw_values(image, torch.zeros(3), grid=(1, 4), low=0, high=1)


def test_values_of_a_token_are_those_of_its_patches() -> None:
    one = seen()
    sizes, low, high, ends = one._values(1, "size")
    for patch, group in enumerate(GROUPS[1]):
        assert group < 0 or sizes[patch] == math.log2(GROUPS[1].count(group))
    assert sizes[17].isnan() and (low, high, ends) == (0.0, 2.0, ("1", "4"))
    # the least similar pair of a group, over all blocks, told by the genealogy of its first patch
    values, _, high, _ = one._values(1, "similarity")
    assert one.trace is not None and high == 1.0
    for patch, group in enumerate(GROUPS[1]):
        steps = [step.similarity for step in one.trace.genealogy(patch + 1) if step.into >= 0]
        assert values[patch].isnan() if group < 0 or not steps else values[patch] == pytest.approx(min(steps))
    with pytest.raises(UnsupportedError, match="hand on all their tokens"):
        seen(inside=True).draw(0, "similarity")
    with pytest.raises(UnsupportedError, match="size is drawn over a grid"):
        seen(grid=None).draw(0, "size")


def test_cells_have_the_colour_of_their_group() -> None:
    drawn = as_tensor(draw_cells(torch.tensor([4, 4, 5, -1, 4])))
    middle = [drawn[12 + 24 * (at // 2), 12 + 24 * (at % 2)] for at in range(6)]
    assert torch.equal(middle[0], middle[1]) and torch.equal(middle[0], middle[4])
    assert middle[2].tolist() == [200] * 3 and middle[3].tolist() == [0] * 3 and middle[5].tolist() == [255] * 3


def test_a_clip_is_pale_around_what_the_model_is_given() -> None:
    frames = [photo((40, 30))] * 2
    first, second = draw_clip(frames, torch.arange(8), grid=(2, 2, 2), box=(5, 5, 35, 25))
    before = as_tensor(frames[0])
    for drawn in map(as_tensor, (first, second)):
        assert torch.equal(drawn[5:25, 5:35], before[5:25, 5:35])
        assert (drawn[:5] - (0.3 * before[:5] + 178.5)).abs().max() <= 1


def test_what_goes_on_keeps_its_number() -> None:
    still = torch.tensor([0, 0, 0, 1, 1, 2])
    renamed = torch.tensor([7, 7, 7, 0, 0, 3])
    first, second = follow([still, renamed])
    assert torch.equal(first, second)
    # the larger share goes on, the smaller one is new; no number twice
    split = follow([still, torch.tensor([4, 4, 5, 1, 1, 2])])[1].tolist()
    assert split[:2] == [0, 0] and split[2] not in (*split[3:], 0) and split[3:] == first[3:].tolist()


def test_a_sheet_keeps_the_shape_of_its_pictures() -> None:
    wide, tall = Image.new("RGB", (40, 20), "red"), Image.new("RGB", (20, 40), "blue")
    page = sheet([[wide, tall]], ["", ""], side=40, gap=4, captions=[["one", "two\nlines"]])
    assert page.size == (2 * 44 + 4, 4 + 80 + 2 * 14 + 4)
    assert page.getpixel((5, 5)) == (255, 0, 0) and page.getpixel((5, 25)) == (255, 255, 255)
    assert page.getpixel((50, 82)) == (0, 0, 255)
