"""Time of vision-language models with fewer visual tokens, over the free bound: write `results/vlm.*` or a `--name`.

Random weights in the shapes of SmolVLM-256M, and of LLaVA-1.5's tower with a small language model. Rows run in turn.
The free bound is the same model given as many visual tokens at no cost: its tower, and its language model on a prompt
of that length.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from tables import write
from torch import Tensor

from tokenmerge.measure.outputs import shared_copy
from tokenmerge.measure.timing import environment
from tokenmerge.vlm import compact, patch
from tokenmerge.vlm.handle import PARTS, VLMHandle
from tokenmerge.vlm.report import now

IMAGE, WORDS = 99, 32
_TEXT = {"vocab_size": 1000, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 4096}
_SMOL_TEXT = {**_TEXT, "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
_SMOL_TEXT |= {"num_attention_heads": 9, "num_key_value_heads": 3}
_SMOL = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_SMOL |= {"image_size": 512, "patch_size": 16}
_CLIP = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
_CLIP |= {"num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768}
_QWEN = {**_TEXT, "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
_QWEN |= {"num_attention_heads": 14, "num_key_value_heads": 2}
_TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
_TINY_TEXT = {**_TINY, "num_key_value_heads": 2}


def smolvlm(crops: int, is_tiny: bool = False) -> tuple[Any, Callable[[int], dict[str, Tensor]]]:
    """Return the model and its prompts: an image of so many crops of 64 tokens; tiny: of 4."""
    small = {**_TINY, "image_size": 128} if is_tiny else {}
    vision, text = {**_SMOL, **small}, {**_SMOL_TEXT, **(_TINY_TEXT if is_tiny else {})}
    config = transformers.SmolVLMConfig(
        vision_config=vision, text_config=text, scale_factor=4, image_token_id=IMAGE, pad_token_id=0
    )
    side = config.vision_config.image_size

    def prompts(batch: int) -> dict[str, Tensor]:
        pixels = torch.randn(batch, crops, 3, side, side)
        mask = torch.ones(batch, crops, side, side, dtype=torch.bool)
        return {**_ids(batch, (side // 64) ** 2 * crops), "pixel_values": pixels, "pixel_attention_mask": mask}

    return transformers.SmolVLMForConditionalGeneration(config), prompts


def llava(is_tiny: bool = False) -> tuple[Any, Callable[[int], dict[str, Tensor]]]:
    """Return the model and its prompts: an image of 576 tokens; tiny: of 16."""
    small = {**_TINY, "image_size": 56} if is_tiny else {}
    vision, text = {**_CLIP, **small}, {**_QWEN, **(_TINY_TEXT if is_tiny else {})}
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    side = config.vision_config.image_size
    model = transformers.LlavaForConditionalGeneration(config)
    return model, lambda batch: {**_ids(batch, (side // 14) ** 2), "pixel_values": torch.randn(batch, 3, side, side)}


def _ids(batch: int, places: int) -> dict[str, Tensor]:
    words = torch.randint(100, 900, (batch, WORDS))
    ids = torch.cat((words[:, :8], torch.full((batch, places), IMAGE), words[:, 8:]), dim=1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def main() -> None:
    """Time every row in turn and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["smolvlm", "llava"], choices=("smolvlm", "llava"))
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--keep", type=float, nargs="+", default=[1.0, 0.5, 0.25, 0.1])
    parser.add_argument("-r", type=int, nargs="+", default=[0, 16], help="merged in each block of the tower")
    parser.add_argument("--methods", nargs="+", default=["divprune"])
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--crops", type=int, default=4, help="of SmolVLM's image (%(default)s)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--name", default="vlm", help="of the files in results (%(default)s)")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in arguments.models:
        torch.manual_seed(0)
        model, prompts = smolvlm(arguments.crops) if name == "smolvlm" else llava()
        model = model.to(arguments.device, getattr(torch, arguments.dtype))
        for batch in arguments.batches:
            rows += timed(
                name,
                model,
                prompts(batch),
                keeps=arguments.keep,
                amounts=arguments.r,
                methods=arguments.methods,
                new_tokens=arguments.new_tokens,
                rounds=arguments.rounds,
            )
            notes = [
                f"{arguments.new_tokens} new tokens, {arguments.dtype}, random weights, medians of {arguments.rounds} "
                "rounds that ran in turn. First token: tower, choosing and prefill. Over bound: the total over that of "
                "the same model given as many visual tokens at no cost."
            ]
            about = environment(torch.device(arguments.device))
            write(arguments.name, "Vision-language models with fewer visual tokens", rows, about, notes)


@torch.inference_mode()
def timed(
    name: str,
    model: Any,
    inputs: dict[str, Tensor],
    *,
    keeps: Sequence[float],
    amounts: Sequence[int],
    methods: Sequence[str],
    new_tokens: int,
    rounds: int,
) -> list[dict[str, Any]]:
    """Time a model on a prompt with each share of the visual tokens kept, `amounts` merged in its tower, by methods."""
    model = model.eval()
    model.generation_config.eos_token_id = None
    inputs = {key: x.to(model.device, model.dtype if x.is_floating_point() else x.dtype) for key, x in inputs.items()}
    batch = len(inputs["input_ids"])
    cases = [(k, r, method) for k in keeps for r in amounts for method in (methods if k < 1 else methods[:1])]
    options = {"max_new_tokens": new_tokens, "do_sample": False}
    handles = {case: patch(shared_copy(model), case[0], r=case[1], method=case[2]) for case in cases}
    plain = {r: patch(shared_copy(model), 1.0, r=r) for r in amounts}
    # the bound's prompts are made once, outside the time
    short = {keep: compact(model, inputs, keep=keep, method="uniform") for keep in keeps}
    times: dict[Any, list[dict[str, float]]] = {case: [] for case in cases}
    bounds: dict[Any, list[float]] = {case: [] for case in cases}
    tokens: dict[Any, int] = {}
    for turn in range(rounds + 1):
        for case, handle in handles.items():
            own, bound = _seconds(handle, inputs, options), _bound(plain[case[1]], inputs, short[case[0]], options)
            pairs = handle.report().tokens
            whole = int((inputs["input_ids"] == IMAGE).sum())
            tokens[case] = (sum(after for _, after in pairs) if pairs else whole) // batch
            if turn:  # the first round warms up
                times[case].append(own)
                bounds[case].append(bound)
    return [_row(name, batch, case, tokens[case], times[case], bounds[case], times) for case in cases]


def _seconds(handle: VLMHandle, inputs: dict[str, Any], options: dict[str, Any]) -> dict[str, float]:
    handle.timed = True
    handle.model.generate(**inputs, **options)  # type: ignore[operator]
    seconds = handle.report(time=True).seconds
    assert seconds is not None
    return seconds


def _bound(handle: VLMHandle, inputs: dict[str, Any], short: dict[str, Any], options: dict[str, Any]) -> float:
    """Return the seconds of the tower, and of generating after a prompt that is short already."""
    names = ("pixel_values", "pixel_attention_mask")
    given = {name: inputs[name] for name in names if name in inputs}
    device = inputs["input_ids"].device
    start = now(device)
    handle.model.base_model.get_image_features(**given)  # type: ignore
    tower = now(device) - start
    # generate changes the outputs that it is given
    encoded = {"mm_encoder_outputs": {"image": short["mm_encoder_outputs"]["image"]}}
    seconds = _seconds(handle, {**short, **encoded}, options)
    return tower + seconds["prefill"] + seconds["decode"]


def _row(name: str, batch: int, case: Any, tokens: int, own: Any, bound: list[float], times: Any) -> dict[str, Any]:
    keep, r, method = case
    parts = {part: _median([row[part] for row in own]) for part in PARTS}
    first = [sum(row[part] for part in ("tower", "choose", "prefill")) for row in own]
    total = [sum(row.values()) for row in own]
    plain = next(value for (kept, merged, _), value in times.items() if kept == 1.0 and not merged)
    whole_first = [sum(row[part] for part in ("tower", "choose", "prefill")) for row in plain]
    return {
        "model": name,
        "batch": batch,
        "keep": keep,
        "r": r,
        "method": method if keep < 1 else "-",
        "visual tokens": tokens,
        **{f"{part} ms": round(1e3 * value, 1) for part, value in parts.items()},
        "first token ms": round(1e3 * _median(first), 1),
        "first token speed-up": round(_median([a / b for a, b in zip(whole_first, first, strict=True)]), 2),
        "total ms": round(1e3 * _median(total), 1),
        "speed-up": round(_median([sum(a.values()) / b for a, b in zip(plain, total, strict=True)]), 2),
        "over bound": round(_median([a / b for a, b in zip(total, bound, strict=True)]), 3),
    }


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


if __name__ == "__main__":
    main()
