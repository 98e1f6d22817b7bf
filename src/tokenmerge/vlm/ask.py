"""Ask a vision-language model the same question with different numbers of visual tokens, side by side."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tokenmerge.errors import DataError, UnsupportedError
from tokenmerge.files import is_dir
from tokenmerge.schedule import R
from tokenmerge.vlm.handle import VLMHandle, patch
from tokenmerge.vlm.methods import Chooser
from tokenmerge.vlm.report import PARTS

__all__ = ["ask", "load_vlm", "prepare"]


def load_vlm(name: str, *, device: str = "cpu", dtype: str = "auto") -> tuple[Any, Any]:
    """Return the model and the processor of a folder that `save_pretrained` wrote, or of a repository.

    Raises `DataError` if they cannot be loaded, `UnsupportedError` without transformers.
    """
    try:
        from transformers import AutoModelForImageTextToText, AutoProcessor
    except ImportError as error:
        raise UnsupportedError("vision-language models need transformers: pip install transformers") from error
    # a folder is not looked up on the hub
    local = {"local_files_only": True} if is_dir(name) else {}
    try:
        processor = AutoProcessor.from_pretrained(name, **local)
        model: Any = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype, **local)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise DataError(
            f"{name} is no vision-language model that transformers can load: {str(error).splitlines()[0]} Give a "
            "folder that save_pretrained wrote of the model and its processor, or a repository and a network."
        ) from error
    return model.eval().to(device), processor


def prepare(processor: Any, images: Sequence[str | Path], prompt: str) -> dict[str, Any]:
    """Return the inputs of a prompt about image files; raises `DataError` for a file that is no image."""
    from PIL import Image

    try:
        pictures = [Image.open(path).convert("RGB") for path in images]
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read an image: {error}.") from error
    if getattr(processor, "chat_template", None):
        content: list[dict[str, Any]] = [*({"type": "image"} for _ in pictures), {"type": "text", "text": prompt}]
        messages = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
    else:
        text = f"{getattr(processor, 'image_token', '<image>') * len(pictures)}{prompt}"
    return dict(processor(text=[text], images=pictures, return_tensors="pt"))


def ask(
    model: Any,
    processor: Any,
    images: Sequence[str | Path],
    prompt: str,
    *,
    keep: Sequence[float | int] = (1.0, 0.5, 0.25),
    method: str | Chooser = "divprune",
    r: R = 0,
    new_tokens: int = 64,
    rounds: int = 3,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Return one row per value of `keep`: answer, tokens and times, the medians of rounds that run in turn.

    Args:
        model: a vision-language model of transformers; it is patched for the time of the call.
        processor: the model's.
        images: image files.
        prompt: the question.
        keep: shares of the visual tokens, or how many of each image.
        method: how they are chosen.
        r: tokens that each block of the vision tower merges; 0 in rows that keep everything.
        new_tokens: how long the answer may be. It is the greedy one.
        rounds: how often each row is timed.
        progress: called with the rounds done and their number.

    Raises the errors of `patch` and `prepare`.
    """
    inputs = {name: x.to(model.device) for name, x in prepare(processor, images, prompt).items()}
    inputs = {name: x.to(model.dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    length = inputs["input_ids"].shape[1]
    seconds: list[list[dict[str, float]]] = [[] for _ in keep]
    rows: list[dict[str, Any]] = [{} for _ in keep]
    for turn in range(rounds):
        for number, share in enumerate(keep):
            with patch(model, share, method=method, r=0 if share == 1.0 else r) as handle, torch.inference_mode():
                handle.timed = True
                out = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
                times = handle.report(time=True).seconds
                assert times is not None
                seconds[number].append(times)
                rows[number] = _row(handle, share, length, processor.decode(out[0, length:], skip_special_tokens=True))
            if progress is not None:
                progress(turn * len(keep) + number + 1, rounds * len(keep))
    for row, times_of in zip(rows, seconds, strict=True):
        parts = {part: 1e3 * statistics.median(times[part] for times in times_of) for part in PARTS}
        row |= {f"{part} ms": round(value, 1) for part, value in parts.items()}
        row["total ms"] = round(sum(parts.values()), 1)
        row["answer"] = row.pop("answer")
    return rows


def _row(handle: VLMHandle, keep: float | int, length: int, answer: str) -> dict[str, Any]:
    pairs = handle.report().tokens
    return {
        "keep": keep,
        "visual tokens": sum(after for _, after in pairs) if pairs else None,
        "prompt tokens": handle.places.shape[1] if pairs else length,
        "answer": answer.strip(),
    }
