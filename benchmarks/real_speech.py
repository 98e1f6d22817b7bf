"""Merging in Whisper's encoder on spoken digits: wrong digits and time over r; write `results/real-speech.*`.

The model is a folder of transformers with its tokenizer (--model), the recordings are DIGIT_SPEAKER_TAKE.wav in a
folder (--recordings), joined to clips of five.
"""

from __future__ import annotations

import argparse
import re
import wave
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tables import write
from torch import Tensor

import tokenmerge
from tokenmerge.measure.outputs import shared_copy
from tokenmerge.measure.timing import environment, interleave

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RATE = 16_000
JOINED = 5
BATCH = 4
PROMPT = (50257, 50362)  # of tiny.en: start of the text, no timestamps


def clips(folder: Path, limit: int) -> tuple[list[np.ndarray], list[str]]:
    """Return clips of five digits by one speaker each, at 16 kHz, and the digits of each."""
    by_speaker: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.wav"), key=lambda path: (path.stem.split("_")[2], path.stem)):
        by_speaker.setdefault(path.stem.split("_")[1], []).append(path)
    generator, sounds, texts = torch.Generator().manual_seed(0), [], []
    for paths in by_speaker.values():
        order = [paths[i] for i in torch.randperm(len(paths), generator=generator)]
        for start in range(0, len(order) - JOINED + 1, JOINED):
            part = order[start : start + JOINED]
            silence = np.zeros(RATE // 5, dtype=np.float32)
            sounds.append(np.concatenate([piece for path in part for piece in (_read(path), silence)]))
            texts.append("".join(path.stem[0] for path in part))
    step = max(1, len(sounds) // limit)
    return sounds[::step][:limit], texts[::step][:limit]


def _read(path: Path) -> np.ndarray:
    with wave.open(str(path)) as file:
        raw = np.frombuffer(file.readframes(file.getnframes()), dtype=np.int16).astype(np.float32) / 2**15
        rate = file.getframerate()
    places = np.arange(int(len(raw) * RATE / rate)) * rate / RATE
    return np.interp(places, np.arange(len(raw)), raw).astype(np.float32)


def digits(text: str) -> str:
    """Return the digits in a transcript, written as words or figures."""
    found = re.findall("|".join((*WORDS, "[0-9]")), text.lower().replace("oh", "zero"))
    return "".join(one if one.isdigit() else str(WORDS.index(one)) for one in found)


def distance(got: str, wanted: str) -> int:
    """Return the edit distance of two strings: wrong, missing and added digits."""
    row = list(range(len(wanted) + 1))
    for i, a in enumerate(got, 1):
        before, row = row, [i]
        for j, b in enumerate(wanted, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (a != b)))
    return row[-1]


@torch.inference_mode()
def heard(model: Any, features: Tensor, tokenizer: Any) -> list[str]:
    """Return the transcript of each clip, by greedy decoding."""
    start = torch.tensor([PROMPT])
    said = []
    for batch in features.split(BATCH):
        ids = model.generate(batch, decoder_input_ids=start.expand(len(batch), -1), max_new_tokens=24, do_sample=False)
        said += tokenizer.batch_decode(ids, skip_special_tokens=True)
    return said


def main() -> None:
    """Transcribe the clips at several r, with the decoder seeing all places or the merged tokens alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of Whisper tiny.en, with tokenizer.json")
    parser.add_argument("--recordings", type=Path, required=True, help="folder of DIGIT_SPEAKER_TAKE.wav, 8 kHz")
    parser.add_argument("--limit", type=int, default=60, help="clips (%(default)s)")
    parser.add_argument("-r", type=int, nargs="+", default=[0, 50, 100, 150, 200, 250, 300], help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (%(default)s)")
    arguments = parser.parse_args()
    from transformers import PreTrainedTokenizerFast, WhisperFeatureExtractor, WhisperForConditionalGeneration, logging

    logging.set_verbosity_error()  # of two lengths given, each time
    model = WhisperForConditionalGeneration.from_pretrained(arguments.model).eval()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(arguments.model / "tokenizer.json"))
    sounds, texts = clips(arguments.recordings, arguments.limit)
    features = WhisperFeatureExtractor()(sounds, sampling_rate=RATE, return_tensors="pt").input_features
    count, rows = sum(map(len, texts)), []
    for restore in ("dense", "merged"):
        for r in arguments.r:
            if r == 0 and restore == "merged":
                continue
            twin = shared_copy(model)
            handle = tokenmerge.patch(twin, r=r, restore=restore)
            wrong = [distance(digits(t), w) for t, w in zip(heard(twin, features, tokenizer), texts, strict=True)]
            rows.append(_row(model, twin, handle, features[:BATCH], restore, r, arguments.rounds))
            rows[-1] |= {"wrong": sum(wrong), "error %": round(100 * sum(wrong) / count, 1), "±": _error(wrong, count)}
            print(rows[-1], flush=True)
    notes = [
        f"Whisper tiny.en on {len(texts)} clips of {JOINED} spoken digits: wrong, missing and added ones of {count}; ± "
        "is one standard error over clips. keys: what the decoder's cross-attention sees; merged tokens have no "
        f"log(size) there. Times of the encoder alone and of a whole transcription, batch {BATCH}."
    ]
    write("real-speech", "Merging in Whisper's encoder", rows, environment(torch.device("cpu")), notes)


def _error(wrong: list[int], count: int) -> float:
    per_clip = torch.tensor(wrong, dtype=torch.float64)
    return round(100 * (per_clip.std() * len(wrong) ** 0.5).item() / count, 1)


def _row(
    model: Any, twin: Any, handle: tokenmerge.Handle, batch: Tensor, restore: str, r: int, rounds: int
) -> dict[str, Any]:
    start = torch.tensor([PROMPT]).expand(len(batch), -1)

    def encoded(one: Any) -> Any:
        with torch.inference_mode():
            return one.get_encoder()(batch)

    def whole(one: Any) -> Any:
        with torch.inference_mode():
            return one.generate(batch, decoder_input_ids=start, max_new_tokens=24, do_sample=False)

    calls = {
        f"{name} {part.__name__}": (lambda part=part, one=one: part(one))
        for name, one in (("unmerged", model), ("merged", twin))
        for part in (encoded, whole)
    }
    timed = interleave(calls, torch.device("cpu"), rounds=rounds)
    keys = encoded(twin).last_hidden_state.shape[1]
    over = {part: round(timed[f"unmerged {part}"].over(timed[f"merged {part}"]), 3) for part in ("encoded", "whole")}
    row = {"restore": restore, "r": r, "tokens": handle.tokens[-1], "keys": keys}
    return {**row, "encoder speed-up": over["encoded"], "speed-up": over["whole"]}


if __name__ == "__main__":
    main()
