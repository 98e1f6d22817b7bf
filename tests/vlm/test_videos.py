"""Videos: placeholders of their own, budgets over frames, positions in time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_vlm_families import by_hand, generate
from tiny_vlms import END, FAMILIES, IMAGE, IS_OLD, NEWER, START, VIDEO, encoded
from torch import Tensor

from tokenmerge.errors import UnsupportedError
from tokenmerge.vlm import patch

transformers = pytest.importorskip("transformers", minversion="4.57")

FRAMES = 3


def prompt(family: str, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Two rows with one video each, of which the second has an image too."""
    generator = torch.Generator().manual_seed(2)

    def text(count: int) -> list[int]:
        return torch.randint(5, 60, (count,), generator=generator).tolist()

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    if family == "llava_onevision":
        video = [VIDEO] * (FRAMES * 4 + 1)
        more: dict[str, Any] = {"pixel_values_videos": draw(2, FRAMES, 3, 32, 32)}
        more |= {"pixel_values": draw(1, 3, 3, 32, 32), "image_sizes": torch.tensor([[64, 32]])}
    else:
        frame = [START, *[VIDEO] * 12, END]
        # Qwen3-VL has each frame of its own, after a time stamp
        video = [token for _ in range(FRAMES) for token in [*text(2), *frame]]
        if family != "qwen3_vl":
            video = [START, *[VIDEO] * 12 * FRAMES, END]
        more = {"pixel_values_videos": draw(2 * FRAMES * 48, 96), "video_grid_thw": torch.tensor([[FRAMES, 8, 6]] * 2)}
        more |= {"pixel_values": draw(48, 96), "image_grid_thw": torch.tensor([[1, 8, 6]])}
    if family == "glm4v":
        # images are refused beside them, whose placeholders the frames have
        video = [
            IMAGE if token == VIDEO else token for frame in range(FRAMES) for token in [START, *[VIDEO] * 12, END, 60]
        ]
        video = [74, *video, 75]  # by which 4.57 knows them
        rows = [[*text(3), *video, *text(4)], [*text(2), *video, *text(5)]]
        del more["pixel_values"], more["image_grid_thw"]
        return _padded(family, rows, more)
    image = [START, *[IMAGE] * FAMILIES[family].tokens, END]
    rows = [[*text(3), *video, *text(4)], [*text(2), *image, *text(2), *video, *text(5)]]
    return _padded(family, rows, more)


def _padded(family: str, rows: list[list[int]], more: dict[str, Any]) -> dict[str, Any]:
    longest = max(map(len, rows))
    ids = torch.tensor([(longest - len(row)) * [0] + row for row in rows])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long(), **more}
    if family != "llava_onevision" and not IS_OLD:
        inputs["mm_token_type_ids"] = (ids == IMAGE).long() + 2 * (ids == VIDEO).long()
    if family == "glm4v" and not IS_OLD:
        inputs["mm_token_type_ids"] = 2 * (ids == IMAGE).long()
    return inputs


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v"])
@pytest.mark.parametrize("method", ["vidcom2", "divprune"])
@torch.no_grad()
def test_fewer_tokens_of_videos_are_the_model_on_spliced_embeddings(family: str, method: str) -> None:
    model, inputs = FAMILIES[family].make(torch.float64), prompt(family)
    plain = generate(model, inputs, new=4)
    with patch(model, 1.0) as handle:
        assert generate(model, inputs, new=4).equal(plain)
        handle.keep, handle.method = 0.5, handle.method if method == "divprune" else _vidcom2()
        logits, places, tokens = model(**inputs).logits, handle.places, generate(model, inputs, new=3)
        assert len(handle.visual_tokens) == (2 if family == "glm4v" else 3)
    length = inputs["input_ids"].shape[1]
    for row, (expected, new) in enumerate(by_hand(model, inputs, places, new=3)):
        torch.testing.assert_close(logits[row][places[row] >= 0], expected, rtol=0, atol=1e-5)
        assert tokens[row, length:].tolist() == new


@torch.no_grad()
def test_frames_are_merged_in_the_tower_as_images_are() -> None:
    model, inputs = FAMILIES["llava_onevision"].make(torch.float64), prompt("llava_onevision")
    frames = inputs["pixel_values_videos"].flatten(0, 1)
    with patch(model, 1.0, r=2):
        video = encoded(model, "video", pixel_values_videos=inputs["pixel_values_videos"])
        alone = [model.model.vision_tower(frame[None], output_hidden_states=True) for frame in frames]
    layer, pooled = model.config.vision_feature_layer, []
    for output in alone:
        projected = model.model.multi_modal_projector(output.hidden_states[layer])
        pooled.append(model.model.apply_pooling(projected))
    without_newline = video[:, :-1].flatten(0, 1)
    torch.testing.assert_close(without_newline, torch.cat(pooled).flatten(0, 1), rtol=0, atol=1e-9)
    with patch(model, 0.5, r=2) as handle:
        assert generate(model, inputs, new=2).shape[1] == inputs["input_ids"].shape[1] + 2
        assert len(handle.visual_tokens) == 3


def _vidcom2() -> Any:
    from tokenmerge.vlm.methods import VidCom2

    return VidCom2()


@torch.no_grad()
def test_evs_keeps_the_first_frame_whole() -> None:
    model, inputs = FAMILIES["qwen2_5_vl"].make(torch.float64), prompt("qwen2_5_vl")
    with patch(model, 0.5, method="evs") as handle:
        model(**inputs)
        video = next(
            places for places, (before, _) in zip(handle.kept, handle.visual_tokens, strict=True) if before == 36
        )
    assert len(video) == 18 and video[:, 0].bincount()[0] == 12


@pytest.mark.parametrize(
    "options",
    [
        {"method": "visionzip"},
        pytest.param({"method": "fastv(layer=1)"}, marks=NEWER),
        pytest.param({"r": 3}, marks=NEWER),
    ],
)
@torch.no_grad()
def test_videos_of_glm(options: dict[str, Any]) -> None:
    """Its frames stand between texts of their own, as images do."""
    model, inputs = FAMILIES["glm4v"].make(torch.float64), prompt("glm4v")
    plain = generate(model, inputs, new=2)
    with patch(model, 0.25, **options) as handle:
        assert generate(model, inputs, new=2).shape == plain.shape
        assert handle.visual_tokens == [(36, 9)] * 2
        places = handle.kept[0]
        if "method" not in options or options["method"] == "visionzip":
            assert places.shape == (9, 3) and (places.amax(dim=0) < torch.tensor([FRAMES, 4, 3])).all()
    assert generate(model, inputs, new=2).equal(plain)


@torch.no_grad()
def test_images_and_videos_of_glm_are_refused_in_one_call() -> None:
    """The plain model takes no such call either."""
    model, inputs = FAMILIES["glm4v"].make(), prompt("glm4v", torch.float32)
    both = {**inputs, "pixel_values": torch.randn(48, 96), "image_grid_thw": torch.tensor([[1, 8, 6]])}
    with pytest.raises((ValueError, RuntimeError), match="do not match"):
        model(**both)
    with patch(model, 0.5), pytest.raises(UnsupportedError, match="glm4v model has the same placeholders for both"):
        model(**both)


@torch.no_grad()
def test_videos_without_a_way_to_be_shortened_are_refused() -> None:
    model, inputs = FAMILIES["internvl"].make(), FAMILIES["internvl"].prompts([1])
    with patch(model, 0.5), pytest.raises(UnsupportedError, match="videos of internvl models are not shortened yet"):
        model(**{**inputs, "pixel_values_videos": torch.zeros(1)})
