"""The job pages and that of `viz`: all on them is done, in order, in a folder that holds what they speak of.

Lines of an `sh` block are commands, which succeed or end with the exit code in their comment; a `python` block is run.
In a `console` block, what follows `$ command` or `>>> expression` is what it says: `...` stands for anything.
"""

from __future__ import annotations

import re
import shlex
import shutil
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from helpers import randomised
from tokenmerge import MergeConfig
from tokenmerge.cli import main
from tokenmerge.tuning import clock

transformers = pytest.importorskip("transformers")
open_clip = pytest.importorskip("open_clip")
av = pytest.importorskip("av")

Capture = pytest.CaptureFixture[str]
ROOT = Path(__file__).parents[2]
PAGES = [*sorted((ROOT / "docs" / "jobs").glob("*.md")), ROOT / "docs" / "visualize.md"]
# what a page says, and what is done instead: nothing is downloaded, and merging makes no tiny model faster
INSTEAD = {
    "--target macs=0.8": "--budget 1 --target macs=0.95",
    "--target agreement=98": "--budget 1 --methods tome --target agreement=60",
    "Intel/dpt-large-ade": "tiny_dpt",
    "hf:facebook/dinov2-small": "hf:tiny_dinov2",
    "hf:MCG-NJU/videomae-base": "hf:tiny_videomae",
    "hf:MIT/ast-finetuned-audioset-10-10-0.4593": "hf:tiny_ast",
    "open_clip:ViT-B-32/openai": "open_clip:tiny-clip/tiny_clip.pt",
    "depth-anything/Depth-Anything-V2-Small-hf": "tiny_depth",
    "hf:openai/clip-vit-base-patch32": "hf:tiny_clip",
    "files:shapes": "files:shapes --workers 0",
    "--target 1.5x": "--budget 1 --target macs=0.8",
    "--data photos/val": "--workers 0 --data photos/val",
    "--data files:photos": "--workers 0 --data files:photos",
    "--data more_photos": "--workers 0 --data more_photos",
    "photos --out": "photos --workers 1 --out",
}
COLOURS = {"blue": (30, 60, 200), "green": (40, 190, 60), "red": (210, 40, 50)}
TOWER = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
SHORT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SIZE = {"height": 32, "width": 32}


def _photo(colour: tuple[int, ...], size: tuple[int, int] = (48, 40)) -> Image.Image:
    noise = torch.randint(-25, 26, (size[1], size[0], 3)) + torch.tensor(colour)
    return Image.fromarray(noise.clamp(0, 255).byte().numpy())


def _photos(folder: Path, count: int) -> None:
    for i in range(count):
        name = [*COLOURS][i % 3]
        (folder / name).mkdir(parents=True, exist_ok=True)
        _photo(COLOURS[name]).save(folder / name / f"{i:03}.jpg")


def _classifier(folder: Path) -> None:
    """A random tower and a classifier that tells the colours apart: merging hardly changes its answers."""
    processor = transformers.ViTImageProcessor(size=SIZE)
    names = dict(enumerate(COLOURS))
    labels = {"id2label": names, "label2id": {name: i for i, name in names.items()}}
    config = transformers.ViTConfig(**SHORT, image_size=32, patch_size=8, **labels)
    model = randomised(transformers.ViTForImageClassification(config)).eval()
    pixels = processor([_photo(colour) for colour in COLOURS.values()] * 10, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        seen = model.vit(pixels).last_hidden_state[:, 0]
        wanted = 10 * torch.eye(3).repeat(10, 1)
        both = torch.linalg.lstsq(torch.cat((seen, torch.ones(30, 1)), dim=1), wanted).solution
        model.classifier.weight.copy_(both[:-1].T)
        model.classifier.bias.copy_(both[-1])
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _dinov2(folder: Path) -> None:
    randomised(
        transformers.Dinov2Model(transformers.Dinov2Config(**TOWER, image_size=32, patch_size=8))
    ).save_pretrained(folder)
    transformers.BitImageProcessor(size={"shortest_edge": 36}, crop_size=SIZE).save_pretrained(folder)


def _clip(folder: Path) -> None:
    towers = {"text_config": {**SHORT, "vocab_size": 64}, "vision_config": {**SHORT, "image_size": 32, "patch_size": 8}}
    transformers.CLIPModel(transformers.CLIPConfig(**towers)).save_pretrained(folder)


def _film(folder: Path) -> None:
    """A model of clips, one of sounds, and a clip and a sound."""
    clips = transformers.VideoMAEConfig(**SHORT, image_size=32, patch_size=16, num_frames=8)
    randomised(transformers.VideoMAEForVideoClassification(clips)).save_pretrained(folder / "tiny_videomae")
    sizes = {"patch_size": 8, "frequency_stride": 8, "time_stride": 8, "max_length": 40, "num_mel_bins": 32}
    listener = transformers.ASTForAudioClassification(transformers.ASTConfig(**SHORT, **sizes))
    randomised(listener).save_pretrained(folder / "tiny_ast")
    transformers.ASTFeatureExtractor(num_mel_bins=32, max_length=40).save_pretrained(folder / "tiny_ast")
    with av.open(str(folder / "clip.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for _ in range(20):
            frame = av.VideoFrame.from_image(_photo((120, 130, 140), (96, 64)))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with wave.open(str(folder / "tone.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8_000)
        file.writeframes((20_000 * (torch.arange(3_000) / 3).sin()).short().numpy().tobytes())


def _depth(folder: Path) -> None:
    backbone = transformers.Dinov2Config(
        **TOWER,
        image_size=56,
        patch_size=14,
        out_indices=[1, 2, 3, 4],
        apply_layernorm=True,
        reshape_hidden_states=False,
    )
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone,
        neck_hidden_sizes=[8] * 4,
        fusion_hidden_size=8,
        reassemble_hidden_size=32,
        patch_size=14,
    )
    model = transformers.DepthAnythingForDepthEstimation(config)
    randomised(model.backbone)
    model.save_pretrained(folder)
    size = {"height": 56, "width": 56}
    transformers.DPTImageProcessor(size=size, keep_aspect_ratio=True, ensure_multiple_of=14).save_pretrained(folder)


def _segmentation(folder: Path) -> None:
    heads = {"backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8}
    sizes = {**TOWER, "intermediate_size": 64, "image_size": 64, "patch_size": 8, "num_labels": 6, "is_hybrid": False}
    model = transformers.DPTForSemanticSegmentation(transformers.DPTConfig(**sizes, **heads))
    randomised(model).save_pretrained(folder)
    transformers.DPTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages speak of."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("jobs")
    _photos(root / "photos" / "val", 200)
    _photos(root / "more_photos", 630)
    _photo((120, 130, 140), (90, 60)).save(root / "photo.jpg")
    _classifier(root / "my_vit")
    _dinov2(root / "tiny_dinov2")
    _depth(root / "tiny_depth")
    _segmentation(root / "tiny_dpt")
    _clip(root / "tiny_clip")
    _film(root)
    for size in ((60, 40), (40, 40)):
        (root / "shapes").mkdir(exist_ok=True)
        _photo((120, 130, 140), size).save(root / "shapes" / f"{size[0]}.jpg")
    return root


@pytest.fixture
def here(things: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    shutil.copytree(things, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(clock, "_ROUNDS", (2,))  # the pages need no time that is certain
    vision = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 3, "head_width": 16}
    text = {"context_length": 6, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    tiny = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-clip", tiny)
    torch.save(randomised(open_clip.create_model("tiny-clip")).state_dict(), "tiny_clip.pt")
    yield tmp_path


def _blocks(page: Path) -> list[tuple[str, str]]:
    return re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(), re.M | re.S)


def _instead(text: str) -> str:
    for said, done in INSTEAD.items():
        text = text.replace(said, done)
    return text


def _command(line: str) -> int:
    words = shlex.split(_instead(line), comments=True)
    if words[:2] == ["pip", "install"]:
        return 0
    assert words[0] == "tokenmerge", f"a page says {line!r}: only tokenmerge and pip install are understood"
    return main(words[1:])


def _codes(line: str) -> set[int]:
    """Return the exit codes that the comment of a command names."""
    return {int(code) for found in re.findall(r"# .*exit code (\d(?: or \d)*)", line) for code in found.split(" or ")}


def _said(block: str) -> Iterator[tuple[str, str]]:
    """Yield every command or expression of a console block, and what it says."""
    for part in re.split(r"^(?=\$ |>>> )", block, flags=re.M):
        if part:
            asked, _, said = part.partition("\n")
            yield asked, said


def _plain(text: str) -> str:
    return " ".join(text.split())


def _fits(expected: str, found: str) -> bool:
    parts = [re.escape(_plain(part)) for part in _instead(expected).split("...")]
    return re.search(".*".join(parts), _plain(found)) is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_says_is_so(page: Path, here: Path, capsys: Capture) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    done = 0
    if page.stem == "deploy":  # it goes on from another page
        MergeConfig("tome", r=8).save("merge.json")
    for kind, block in _blocks(page):
        if kind == "python":
            exec(compile(_instead(block), page.name, "exec", dont_inherit=True), names)
        for line in filter(None, block.splitlines()) if kind == "sh" else ():
            assert _command(line) in (_codes(line) or {0}), f"{line}\n{capsys.readouterr()}"
        for asked, expected in _said(block) if kind == "console" else ():
            capsys.readouterr()
            if asked.startswith("$ "):
                assert _command(asked[2:]) in (_codes(asked) or {2}), asked
                said = "".join(capsys.readouterr())
            else:
                with pytest.raises(Exception) as raised:
                    exec(_instead(asked[4:]), names)
                said = f"{raised.type.__name__}: {raised.value}"
            assert _fits(expected, said), f"{asked}\nsays:\n{said}\non the page:\n{expected}"
        done += kind in ("sh", "python", "console")
    assert done >= 3, "a page without commands"


def test_every_stand_in_is_of_a_page() -> None:
    text = "".join(page.read_text() for page in PAGES)
    assert not [said for said in INSTEAD if said not in text], "nothing is done instead of these"
    assert {page.stem for page in PAGES} == {
        "classifier",
        "embeddings",
        "embed-a-folder",
        "engines-and-indexes",
        "billion-images",
        "serve",
        "depth",
        "segmentation",
        "deploy",
        "own-photo",
        "visualize",
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_a_message_is_compared_word_by_word() -> None:
    assert _fits("no folder x: ... or a\nfolder", "tokenmerge: no folder x: give this or a folder.")
    assert not _fits("no folder x", "no folder y") and not _fits("a ... b", "b a")
