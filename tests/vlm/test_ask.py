"""`tokenmerge vlm` on a small model that was saved with its processor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_vlms import FAMILIES, IMAGE, IS_OLD

from tokenmerge.cli import main

transformers = pytest.importorskip("transformers", minversion="4.57")
WORDS = ("what", "is", "on", "this", "photo", "a", "cat", "dog", "?")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA with a tokenizer of a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vlm")
    names = {word: 5 + number for number, word in enumerate(WORDS)}
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **names, "<image>": IMAGE}
    vocabulary |= {f"word{number}": number for number in range(20, 80) if number != IMAGE}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
        extra_special_tokens={"image_token": "<image>"},
    )
    own = "CLIPImageProcessor" if IS_OLD else "CLIPImageProcessorPil"
    pictures = getattr(transformers, own)(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, do_center_crop=True
    )
    processor = transformers.LlavaProcessor(
        pictures, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    processor.save_pretrained(path)
    FAMILIES["llava"].make().save_pretrained(path)
    return path


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    from PIL import Image

    Image.effect_noise((40, 50), 90).convert("RGB").save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def asked(capsys: Any, *arguments: str) -> list[dict[str, Any]]:
    assert main(["vlm", *arguments, "--new-tokens", "4", "--rounds", "1", "--json"]) == 0
    rows: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["rows"]
    return rows


def test_answers_tokens_and_times_side_by_side(folder: Path, photo: Path, capsys: Any) -> None:
    given = [str(folder), "--image", str(photo), "--prompt", "what is on this photo ?"]
    whole, half, quarter = asked(capsys, *given, "--keep", "1", "0.5", "0.25")
    assert [row["visual tokens"] for row in (whole, half, quarter)] == [16, 8, 4]
    assert [row["prompt tokens"] for row in (whole, half, quarter)] == [22, 14, 10]
    assert all(row["answer"] and row["tower ms"] >= 0 and row["prefill ms"] > 0 for row in (whole, half, quarter))
    for row in (whole, half):
        assert row["tower ms"] > 0
        parts = sum(row[f"{part} ms"] for part in ("tower", "choose", "prefill", "decode"))
        assert row["total ms"] == pytest.approx(parts, abs=0.3)
    assert whole["choose ms"] == 0 < half["choose ms"]
    # what the model says is what it says in Python
    from tokenmerge.vlm import patch
    from tokenmerge.vlm.ask import load_vlm, prepare

    model, processor = load_vlm(str(folder), dtype="float32")
    inputs = prepare(processor, [photo], "what is on this photo ?")
    with patch(model, 0.5), torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert processor.decode(out[0, 22:], skip_special_tokens=True).strip() == half["answer"]
    (counted,) = asked(capsys, *given, "--keep", "3", "--count", "-r", "2")
    assert counted["visual tokens"] == 3


def test_the_answers_stand_below_the_table(folder: Path, photo: Path, capsys: Any, monkeypatch: Any) -> None:
    """However narrow the terminal is."""
    monkeypatch.setenv("COLUMNS", "80")
    given = [str(folder), "--image", str(photo), "--prompt", "what is on this photo ?", "--keep", "1", "0.5"]
    rows = asked(capsys, *given)
    assert main(["vlm", *given, "--new-tokens", "4", "--rounds", "1"]) == 0
    out = capsys.readouterr().out
    assert all(f"\nkeep {row['keep']}: {row['answer']}\n" in out for row in rows)
    assert "total ms" in out.splitlines()[2] and max(map(len, out.splitlines()[2:6])) <= 80


def test_one_token_merges_in_the_tower_as_any_number_does(folder: Path, photo: Path) -> None:
    """1 is one token, and 1.0 all: the plain model."""
    from tokenmerge.vlm import ask as module

    model, processor = module.load_vlm(str(folder), dtype="float32")
    given: list[Any] = []
    original = module.patch

    def seen(*args: Any, **options: Any) -> Any:
        given.append((args[1], options["r"]))
        return original(*args, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "patch", seen)
        rows = module.ask(model, processor, [photo], "a ?", keep=[1, 1.0], r=2, new_tokens=2, rounds=1)
    assert given == [(1, 2), (1.0, 0)] and [row["visual tokens"] for row in rows] == [1, 16]


def test_photos_of_sixteen_bits_and_of_cameras_that_were_turned(folder: Path, tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    from tokenmerge.vlm.ask import load_vlm, prepare

    _, processor = load_vlm(str(folder))
    grey = np.random.default_rng(0).integers(0, 255, (32, 32), dtype=np.uint8)

    def pixels(name: str) -> Any:
        return prepare(processor, [tmp_path / name], "a ?")["pixel_values"]

    Image.fromarray(grey).save(tmp_path / "plain.png")
    Image.fromarray(grey.astype(np.uint16) << 8).save(tmp_path / "deep.png")
    assert pixels("deep.png").equal(pixels("plain.png"))
    turned = Image.Exif()
    turned[0x0112] = 6  # the top is on the right
    Image.fromarray(np.rot90(grey)).save(tmp_path / "turned.png", exif=turned)
    assert pixels("turned.png").equal(pixels("plain.png"))


def test_a_template_that_writes_the_first_token(folder: Path, photo: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    from tokenmerge.vlm.ask import load_vlm, prepare

    _, processor = load_vlm(str(folder))
    backend = processor.tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    body = "{% for part in messages[0].content %}{{ '<image>' if part.type == 'image' else part.text }} {% endfor %}"
    for start in ("", "<s> "):
        processor.chat_template = start + body
        ids = prepare(processor, [photo], "a cat ?")["input_ids"][0].tolist()
        assert ids[:2] == [1, IMAGE] and ids.count(1) == 1


def test_a_pipeline_of_a_patched_model(folder: Path, photo: Path) -> None:
    from PIL import Image

    from tokenmerge.vlm import patch

    pipe = transformers.pipeline("image-text-to-text", str(folder))
    given: dict[str, Any] = {"images": Image.open(photo), "text": "<image> what is on this photo ?"}
    given |= {"generate_kwargs": {"max_new_tokens": 12, "do_sample": False}}
    (plain,) = pipe(**given)
    with patch(pipe.model, 0.5) as handle:
        (short,) = pipe(**given)
        assert handle.visual_tokens == [(16, 8)]
    assert short["generated_text"].startswith("<image> what is on this photo ?")
    assert short != plain and pipe(**given) == [plain]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--keep": "0"}, "--keep is 0. Give a share"),
        ({"--keep": "nan"}, "--keep is nan. Give a share"),
        (
            {"--keep": "3"},
            "--keep is 3. Give a share of the visual tokens, above 0 and up to 1, or numbers of tokens with",
        ),
        ({"--keep": "2.7", "--count": ""}, "--keep is 2.7, and --count reads numbers of tokens"),
        ({"--rounds": "0"}, "at least 1 round and 1 new token; got 0 and 64"),
        ({"--new-tokens": "0"}, "at least 1 round and 1 new token; got 3 and 0"),
        ({"--dtype": "float33"}, "no dtype 'float33'; there are: float32"),
        ({"--device": "gpu"}, "no device 'gpu'"),
        ({"--image": "/nowhere.png"}, "cannot read an image"),
        ({"--method": "divprun"}, "Did you mean 'divprune'"),
        ({"model": "/nowhere"}, "/nowhere is no vision-language model that transformers can load"),
    ],
)
def test_bad_input_to_the_command(folder: Path, photo: Path, capsys: Any, change: dict[str, str], message: str) -> None:
    given = {"--image": str(photo), "--prompt": "a ?", **change}
    model = given.pop("model", str(folder))
    assert main(["vlm", model, *[part for pair in given.items() for part in pair if part]]) == 2
    assert message in capsys.readouterr().err
