"""Draw the groups of a sound on its spectrogram. S samples, M mel bands, F frames."""

from __future__ import annotations

import math
import wave
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokenmerge import Handle
from tokenmerge.data.prepare import PROCESSOR
from tokenmerge.data.sounds import LENGTH, RATE, mel, read_wave, spectrogram
from tokenmerge.errors import ConfigError, DataError, UnsupportedError
from tokenmerge.report.spectrograms import plot_groups
from tokenmerge.tools.visualize import look_at
from tokenmerge.tools.viz import Job

__all__ = ["draw_sound"]

_HOP = 0.01  # seconds between two frames of AST's and Whisper's spectrograms
_RATE = 16_000  # of their sounds


class _Heard(NamedTuple):
    """A sound as a model takes it, and how that lies in time and frequency."""

    x: Tensor  # [1, ...]
    level: Tensor  # [M, F], the lowest frequency first
    start: float  # seconds in the sound
    seconds: float
    hertz: Tensor  # [M]
    fact: str
    end: float | None = None  # seconds of silence that fills up the input begin here


def draw_sound(job: Job, path: Path, name: str) -> None:
    """Draw the groups of a sound after each block; raises `DataError` for what is no sound that can be read."""
    if set(job.shows) - {"groups"}:
        raise UnsupportedError(
            f"of sounds the groups are drawn, not {', '.join(job.shows)}: leave --show out for {path}."
        )
    heard = _heard(job.handle, path)
    job.note(_assumed(job.handle.model))
    tower = next(job.handle.model.parameters())
    seen = look_at(job.handle, heard.x.to(tower), None, None, path.name, part=_encoder(job.handle.model))
    count = seen.groups[0].shape[0]
    grid = seen.grid or job.handle.grid or (1, count)  # encoders such as Whisper's have a token for each time
    if grid[0] * grid[1] != count:
        raise UnsupportedError(f"{count} tokens are not {grid[0]} x {grid[1]} patches: where they lie is not known.")
    job.row(path.name, seen)
    job.fact(f"{path.name}: {heard.fact}.")
    for block in job.blocks:
        plot_groups(
            job.path(job.name(name, "groups", block)),
            heard.level,
            seen.groups[block],
            grid,
            start=heard.start,
            seconds=heard.seconds,
            hertz=heard.hertz,
            end=heard.end,
            title=f"{path.name}, block {block + 1}, {seen.tokens[block]} tokens",
        )


def _heard(handle: Handle, path: Path) -> _Heard:
    model, size = handle.model, tuple(handle.input_size or ())
    kind = str(getattr(model, "main_input_name", ""))
    if len(size) == 2 and kind in ("input_values", "input_features"):
        return _of_transformers(model, size, _read(path, _RATE), kind)
    if len(size) == 3 and size[0] == 1:
        return _of_ours(size, _read(path, RATE))
    raise UnsupportedError(
        f"{path} is a sound, and this {type(model).__qualname__} takes {size or 'inputs of unknown size'}: sounds are "
        "drawn for models of spectrograms: AST, Whisper, or one channel of mel bands as `tokenmerge train` makes."
    )


def _of_ours(size: tuple[int, ...], sound: Tensor) -> _Heard:
    """Return the spectrogram that `tokenmerge train` gives its models: 2 s, the middle of a longer sound."""
    x = spectrogram(size)(sound)
    edges = torch.linspace(0, float(mel(torch.tensor(RATE / 2))), size[1] + 2).double()
    hertz = 700 * (10 ** (edges[1:-1] / 2595) - 1)
    start = -((LENGTH - sound.shape[0]) // 2) / RATE
    seconds = size[2] * (LENGTH // size[2]) / RATE
    fact = f"as tokenmerge train prepares sounds{_part('middle', seconds, sound.shape[0] / RATE)}"
    return _Heard(x[None], x[0], start, seconds, hertz, fact)


def _of_transformers(model: nn.Module, size: tuple[int, ...], sound: Tensor, kind: str) -> _Heard:
    """Return the input of an audio spectrogram transformer (`[F, M]`), or of an encoder like Whisper's (`[M, F]`)."""
    extractor, fact = _extractor(model, size, kind)
    x = torch.as_tensor(extractor(sound.numpy(), sampling_rate=_RATE, return_tensors="pt")[kind])
    is_ast = kind == "input_values"
    x = x[:, : size[0]] if is_ast else x[..., : size[1]]
    level = x[0].T if is_ast else x[0]
    if is_ast:  # Kaldi's mel scale
        low, high = (1127 * math.log1p(end / 700) for end in (20, _RATE / 2))
        hertz = 700 * (torch.linspace(low, high, level.shape[0] + 2).double().div(1127).exp() - 1)
    else:  # Slaney's: straight up to 1,000 Hz
        steps = torch.linspace(0, 15 + math.log(_RATE / 2 / 1000) * 27 / math.log(6.4), level.shape[0] + 2).double()
        hertz = torch.where(steps < 15, steps * 200 / 3, 1000 * ((steps - 15) * math.log(6.4) / 27).exp())
    seconds, whole = level.shape[1] * _HOP, sound.shape[0] / _RATE
    return _Heard(x, level, 0.0, seconds, hertz[1:-1], f"{fact}{_part('first', seconds, whole)}", whole)


def _part(which: str, seconds: float, whole: float) -> str:
    """Say which part of a sound a model is given, if it is not all."""
    return f"; the model is given the {which} {seconds:.1f} of its {whole:.1f} s" if whole > seconds + 0.05 else ""


def _extractor(model: nn.Module, size: tuple[int, ...], kind: str) -> tuple[Any, str]:
    """Return the feature extractor of a model: that of its folder, else its class's with the model's sizes."""
    from transformers import ASTFeatureExtractor, AutoFeatureExtractor, WhisperFeatureExtractor

    folder = Path(str(getattr(model, "name_or_path", "")))
    if (folder / PROCESSOR).is_file():
        try:
            found = AutoFeatureExtractor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            raise ConfigError(f"{folder / PROCESSOR} cannot be read as a feature extractor: {error}.") from error
        return found, f"prepared by {type(found).__name__} of {folder / PROCESSOR}"
    if kind == "input_values":
        return ASTFeatureExtractor(num_mel_bins=size[1], max_length=size[0]), "prepared by a new ASTFeatureExtractor"
    return WhisperFeatureExtractor(feature_size=size[0]), "prepared by a new WhisperFeatureExtractor"


def _assumed(model: nn.Module) -> str:
    """Return a warning where the mean and deviation of spectrograms are the class's, not the model's own."""
    folder = Path(str(getattr(model, "name_or_path", "")))
    if getattr(model, "main_input_name", "") == "input_values" and not (folder / PROCESSOR).is_file():
        return f"The model has no {PROCESSOR}: its sounds are prepared as its class's are, which is assumed."
    return ""


def _encoder(model: nn.Module) -> nn.Module | None:
    """Return the part of a model of sounds and text that takes the sound alone; None: all of it."""
    is_both = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    is_listener = hasattr(model, "get_encoder") and "AudioClassification" not in type(model).__name__
    found: Any = model
    return found.get_encoder() if is_both and is_listener else None


def _read(path: Path, rate: int) -> Tensor:
    try:
        return read_wave(str(path), rate)
    except (OSError, EOFError, ValueError, KeyError, wave.Error) as error:
        raise DataError(
            f"cannot read the sound {path}: {str(error).rstrip('.') or type(error).__name__}. Sounds are .wav files of "
            "PCM samples."
        ) from error
