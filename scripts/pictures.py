"""Make the pictures of the README and the docs, on scikit-image's photographs: `python scripts/pictures.py WEIGHTS`.

WEIGHTS is a file of CLIP ViT-B/16's image tower (.safetensors) with the names of timm's
`vit_base_patch16_clip_quickgelu_224.openai`. With `--photographs FOLDER`, of FOLDER/CLASS/x.jpg, the explorer has a
linear head of class means of their features. The explorer's pictures need playwright and Debian's chromium.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import skimage.data
import torch
from PIL import Image
from torch import nn

import tokenmerge
from tokenmerge.data.prepare import find_preprocessing
from tokenmerge.data.settings import Data
from tokenmerge.data.sounds import RATE
from tokenmerge.data.sources import open_source
from tokenmerge.testing.models.drawn import tiny_vit
from tokenmerge.tools.visualize import sheet
from tokenmerge.tools.viz import viz

TOWER, LABEL = "vit_base_patch16_clip_quickgelu_224.openai", "CLIP ViT-B/16, 8-bit weights"
IMAGES = Path(__file__).parents[1] / "docs" / "images"
SIZE, SIDE = (3, 224, 224), 300
ACROSS = "astronaut", (4, 8, 12, 16)  # one photo at several r
DOWN = "chelsea", (2, 5, 8, 11)  # another after several blocks


def main() -> None:
    """Make all pictures, or some of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="CLIP ViT-B/16's image tower, .safetensors")
    parser.add_argument("--photographs", type=Path, help="a folder of CLASS/x.jpg, for the explorer's classes")
    parser.add_argument("--only", nargs="+", choices=PICTURES, default=list(PICTURES), metavar="NAME")
    arguments = parser.parse_args()
    model = tokenmerge.load(f"timm:{TOWER}/{arguments.weights}")
    for name in arguments.only:
        PICTURES[name](model, arguments.photographs)
        print(f"{name} is drawn", flush=True)


def photograph(name: str) -> Any:
    """Return one of scikit-image's photographs."""
    return Image.fromarray(getattr(skimage.data, name)())


def merged(model: nn.Module, _: Path | None) -> None:
    """The README's: one photo at several r, another after several blocks, with tokens and share of the MACs."""
    whole = tokenmerge.macs(model, SIZE)
    rows, captions = [], []
    name, rs = ACROSS
    rows.append([_middle(model, name)])
    captions.append(["the photo: 197 tokens\n100 % of the MACs"])
    for r in rs:
        with tokenmerge.patch(model, r=r) as handle:
            rows[0].append(tokenmerge.visualize(handle, photograph(name), cut=True))
            share = 100 * tokenmerge.macs(model, SIZE) / whole
            captions[0].append(f"r = {r}: {handle.tokens[-1]} tokens at the end\n{share:.0f} % of the MACs")
    name, blocks = DOWN
    rows.append([_middle(model, name)])
    with tokenmerge.patch(model, r=16) as handle:
        share = 100 * tokenmerge.macs(model, SIZE) / whole
        captions.append([f"r = 16, {share:.0f} % of the MACs:\n197 tokens at the start"])
        for block in blocks:
            rows[1].append(tokenmerge.visualize(handle, photograph(name), block=block, cut=True))
            captions[1].append(f"after block {block + 1}:\n{handle.tokens[block]} tokens")
    sheet(rows, [""] * 5, side=SIDE, captions=captions, font=16, gap=12).save(IMAGES / "merged.png", optimize=True)


def own_photo(model: nn.Module, _: Path | None) -> None:
    """The job page's: what its snippet writes."""
    photo = photograph("coffee")
    pictures, labels = [photo], ["photo"]
    for r in (4, 8, 16):
        with tokenmerge.patched(model, r=r) as handle:
            pictures.append(tokenmerge.visualize(handle, photo))
            labels.append(f"r = {r}: {handle.tokens[-1]} tokens")
    sheet([pictures], labels, side=224).save(IMAGES / "own-photo.png", optimize=True)


def overlays(model: nn.Module, _: Path | None) -> None:
    """All that is shown of one photo."""
    with tokenmerge.patch(model, r=16) as handle:
        shows = ("groups", "size", "similarity", "attention")
        found = [tokenmerge.visualize(handle, photograph("coffee"), block=7, show=show, cut=True) for show in shows]
    sheet([found], [f"{show}, after block 8" for show in shows], side=SIDE, font=14).save(
        IMAGES / "overlays.png", optimize=True
    )


def clip_strip(model: nn.Module, _: Path | None) -> None:
    """A strip of a part that moves over a photo."""
    av = __import__("av")
    import numpy as np

    photo = photograph("rocket").resize((640, 427))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=12)
            stream.width, stream.height, stream.pix_fmt, stream.options = 320, 320, "yuv420p", {"crf": "12"}
            for t in range(24):
                part = photo.crop((8 * t + 60, 60, 8 * t + 380, 380))
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(part), format="rgb24")))
            container.mux(stream.encode())
        found = viz(model, path, Path(folder) / "out", r=14, frames=8, cut=True)
        strip = next(name for name in found.files if "strip" in name)
        shutil.copy(found.folder / strip, IMAGES / "clip-strip.png")


def sound(model: nn.Module, _: Path | None) -> None:
    """A tone of the recipes, and a small random model of spectrograms."""
    import wave

    tones = open_source("tones", "test", Data(size=(1, 64, 128)))
    tone = next(sound for sound, label in map(tones.read, range(99)) if tones.classes[label] == "arch")
    torch.manual_seed(0)
    listener = tiny_vit(img_size=(64, 128), patch_size=8, in_chans=1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tone.wav"
        with wave.open(str(path), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(RATE)
            file.writeframes((tone.clamp(-1, 1) * 32_767).short().numpy().tobytes())
        found = viz(listener, path, Path(folder) / "out", r=16)
        with Image.open(found.folder / found.files[0]) as picture:
            picture.resize((900, 540), Image.LANCZOS).save(IMAGES / "sound.png", optimize=True)


def explorer(model: nn.Module, photographs: Path | None) -> None:
    """The explorer on a wide screen, and on a phone with a token that was clicked."""
    names = None if photographs is None else _with_classes(model, photographs)
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for name in ("chelsea", "coffee", "astronaut"):
            files.append(Path(folder) / f"{name}.png")
            photograph(name).save(files[-1])
        page = Path(folder) / "explore.html"
        tokenmerge.explore(
            model, files, page, rs=[4, 8, 16], methods=["tome", "attention"], labels=names, label=LABEL, rounds=9
        )
        with _browser() as browser:
            _shot(browser, page, (1160, 1040), "#image=2&block=12&left=tome%408&right=attention%408", "explore.png")
            link = "#image=2&block=10&left=tome%4016&token=145"
            _shot(browser, page, (390, 1120), link, "explore-phone.png", color_scheme="dark", device_scale_factor=1.5)


def _middle(model: nn.Module, name: str) -> Any:
    """Return the part of a photograph that the model is given."""
    with tokenmerge.patch(model, r=0) as handle:
        return tokenmerge.visualize(handle, photograph(name), cut=True)


def _with_classes(model: Any, folder: Path) -> Sequence[str]:
    """Give the tower a linear head of class means of its features, and return the names of the classes."""
    prepared, means = find_preprocessing(model), []
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    for place in classes:
        x = torch.stack([prepared(Image.open(file)) for file in sorted(place.iterdir())[:5]])
        with torch.inference_mode():
            means.append(nn.functional.normalize(model(x), dim=1).mean(dim=0))
    centre = torch.stack(means).mean(dim=0)
    directions = nn.functional.normalize(torch.stack(means) - centre, dim=1)
    head = nn.Linear(model.head.in_features, len(classes))
    with torch.no_grad():
        # as sharp as cosines of CLIP are read, on features of any length
        length = torch.stack(means).norm(dim=1).mean()
        projection = directions @ model.head.weight
        head.weight.copy_(100 * projection / projection.norm(dim=1, keepdim=True) / length)
        head.bias.zero_()
    model.head, model.num_classes = head, len(classes)
    return [place.name.replace("_", " ") for place in classes]


@contextmanager
def _browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with sync_playwright() as started:
        opened = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


def _shot(browser: Any, page: Path, size: tuple[int, int], link: str, name: str, **options: Any) -> None:
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, **options)
    tab = context.new_page()
    tab.goto(f"{page.as_uri()}{link}")
    tab.wait_for_selector("html[data-ready]")
    with tempfile.NamedTemporaryFile(suffix=".png") as file:
        tab.screenshot(path=file.name)
        Image.open(file.name).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(IMAGES / name, optimize=True)
    context.close()


PICTURES = {
    "merged": merged,
    "own-photo": own_photo,
    "overlays": overlays,
    "clip-strip": clip_strip,
    "sound": sound,
    "explorer": explorer,  # the last, as it changes the head
}

if __name__ == "__main__":
    main()
