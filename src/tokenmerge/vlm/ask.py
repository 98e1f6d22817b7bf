"""Ask a vision-language model the same question with different numbers of visual tokens, side by side."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenmerge.data.opening import decode
from tokenmerge.errors import DataError, UnsupportedError
from tokenmerge.files import is_dir
from tokenmerge.measure.outputs import find_device, find_dtype
from tokenmerge.schedule import R
from tokenmerge.tools.network import failing_at_once
from tokenmerge.vlm.handle import VLMHandle, patch
from tokenmerge.vlm.inputs import check_keep
from tokenmerge.vlm.methods import Chooser
from tokenmerge.vlm.report import PARTS

__all__ = ["ask", "load_vlm", "prepare"]


def load_vlm(name: str, *, device: str = "cpu", dtype: str = "auto") -> tuple[Any, Any]:
    """Return the model and the processor of a folder that `save_pretrained` wrote, or of a repository.

    Raises `DataError` if they cannot be loaded, `UnsupportedError` for an unknown device or `dtype`, and without
    transformers.
    """
    place = find_device(device)
    if dtype != "auto":
        find_dtype(dtype)
    try:
        from transformers import AutoModelForImageTextToText, AutoProcessor
    except ImportError as error:
        raise UnsupportedError("vision-language models need transformers: pip install transformers") from error
    # a folder is not looked up on the hub
    local = {"local_files_only": True} if is_dir(name) else {}
    try:
        with nullcontext() if local else failing_at_once():
            processor = AutoProcessor.from_pretrained(name, **local)
            model: Any = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype, **local)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise DataError(
            f"{name} is no vision-language model that transformers can load: {str(error).splitlines()[0]} Give a "
            "folder that save_pretrained wrote of the model and its processor, or a repository and a network."
        ) from error
    return model.eval().to(place), processor


def prepare(processor: Any, images: Sequence[str | Path], prompt: str) -> dict[str, Any]:
    """Return the inputs of a prompt about image files; raises `DataError` for a file that is no image."""
    try:
        pictures = [decode(str(path), partial(str, path)).convert("RGB") for path in images]
    except OSError as error:
        raise DataError(f"cannot read an image: {error}.") from error
    if getattr(processor, "chat_template", None):
        content: list[dict[str, Any]] = [*({"type": "image"} for _ in pictures), {"type": "text", "text": prompt}]
        messages = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
    else:
        text = f"{getattr(processor, 'image_token', '<image>') * len(pictures)}{prompt}"
    # templates may write the token that a text starts with, which the tokenizer would put in front again
    start = getattr(processor.tokenizer, "bos_token", None)
    more = {"add_special_tokens": False} if start and text.startswith(start) else {}
    return dict(processor(text=[text], images=pictures, return_tensors="pt", **more))


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

    Raises `ConfigError` for a wrong `keep`, `DataError` for fewer than 1 round or new token, and the errors of `patch`
    and `prepare`.
    """
    for share in keep:
        check_keep(share)
    if rounds < 1 or new_tokens < 1:
        raise DataError(f"an answer needs at least 1 round and 1 new token; got {rounds} and {new_tokens}.")
    inputs = {name: x.to(model.device) for name, x in prepare(processor, images, prompt).items()}
    inputs = {name: x.to(model.dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    seconds: list[list[dict[str, float]]] = [[] for _ in keep]
    rows: list[dict[str, Any]] = [{} for _ in keep]
    for turn in range(rounds):
        for number, share in enumerate(keep):
            is_whole = isinstance(share, float) and share == 1.0
            with patch(model, share, method=method, r=0 if is_whole else r) as handle, torch.inference_mode():
                handle.timed = True
                out = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
                times = handle.report(time=True).seconds
                assert times is not None
                seconds[number].append(times)
                new = out[0, inputs["input_ids"].shape[1] :]
                rows[number] = _row(handle, inputs["input_ids"], processor.decode(new, skip_special_tokens=True))
            if progress is not None:
                progress(turn * len(keep) + number + 1, rounds * len(keep))
    for row, times_of in zip(rows, seconds, strict=True):
        parts = {part: 1e3 * statistics.median(times[part] for times in times_of) for part in PARTS}
        # the total and what fewer tokens shorten first: narrow terminals show the first columns
        row["total ms"] = round(sum(parts.values()), 1)
        row |= {f"{part} ms": round(parts[part], 1) for part in ("prefill", "tower", "choose", "decode")}
        row["answer"] = row.pop("answer")
    return rows


def _row(handle: VLMHandle, ids: Tensor, answer: str) -> dict[str, Any]:
    pairs = handle.report().tokens
    whole = int((ids == handle.model.config.image_token_id).sum())  # type: ignore[union-attr]
    return {
        "keep": handle.keep,
        "visual tokens": sum(after for _, after in pairs) if pairs else whole,
        "prompt tokens": (handle.places if pairs else ids).shape[1],
        "answer": answer.strip(),
    }
