"""Sources of sounds: synthetic tones and folders of wav files, and the spectrogram that models take.

Shapes: S samples, M mel bands, F frames of a spectrogram. A sound is float `[S]` within -1 to 1, at `RATE` samples a
second.
"""

from __future__ import annotations

import math
import wave
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenmerge.data.settings import Data
from tokenmerge.data.sources import SPLITS, Raw, Source, labelled, seed_of
from tokenmerge.errors import ConfigError

__all__ = ["LENGTH", "RATE", "mel", "read_wave", "spectrogram", "tones", "wav"]

RATE = 8_000  # samples per second, in every source
LENGTH = 2 * RATE  # samples of a synthetic sound, and of the part shown in a spectrogram
_WINDOW = 256  # samples per frame of a spectrogram
_ENDLESS = 0x7FFF0000  # bytes, about, that a file claims whose writer did not know its length
_LOUDNESS = 80.0  # dynamic range in decibels: power further below the loudest is clipped


class Tones(Source):
    """Synthetic sounds of 2 s in twelve classes, drawn from the split and the index, so a sound is always the same.

    Each lasts 0.6 to 1.4 s and starts anywhere. Also drawn: its pitch (200 to 1,600 Hz at the start), its loudness, and
    background noise (6 dB above the sound to 18 dB below it). All but the noises have one weak overtone. Classes differ
    in pitch (steady, rising, falling, up and down, warbling, in steps), in loudness (steady, trembling, pulses, fading
    like a bell), or have two pitches or none.
    """

    kind = "sound"
    classes = (
        "steady",
        "rising",
        "falling",
        "arch",
        "warble",
        "steps",
        "tremble",
        "pulses",
        "bell",
        "chord",
        "noise",
        "noise bursts",
    )
    size = (1, 64, 128)
    lengths = {"train": 20_000, "valid": 1_000, "test": 2_000}  # noqa: RUF012 - never changed
    flippable = False

    def __init__(self, rest: str, split: str, data: Data) -> None:
        self.length, self.split = self.lengths[split], list(SPLITS).index(split)

    def __len__(self) -> int:
        return self.length

    def read(self, index: int) -> tuple[Raw, int]:
        generator = torch.Generator().manual_seed(seed_of(self.split, index))
        label = int(torch.randint(len(self.classes), (1,), generator=generator))
        draw = torch.rand(8, generator=generator).tolist()
        length = int((0.6 + 0.8 * draw[0]) * RATE)
        start = int(draw[1] * (LENGTH - length))
        sound = _sound(self.classes[label], torch.arange(length) / RATE, draw[2:6], generator)
        edge = torch.arange(1, length + 1).minimum(torch.arange(length, 0, -1)) / (0.02 * RATE)
        sound = sound * edge.clamp(max=1)  # fades of 20 ms, so that no click marks the start
        power = sound.square().mean().sqrt()
        whole = torch.randn(LENGTH, generator=generator) * 10 ** ((-18 + 24 * draw[6]) / 20)
        whole[start : start + length] += sound / power
        return whole * (0.02 + 0.1 * draw[7]) / whole.square().mean().sqrt(), label


def _sound(name: str, t: Tensor, draw: Sequence[float], generator: torch.Generator) -> Tensor:
    """Return a sound of a class at times `t` (s), at any loudness."""
    if name.startswith("noise"):
        loudness = _beats(t, 3 + 5 * draw[1]) if name == "noise bursts" else torch.ones_like(t)
        return torch.randn(len(t), generator=generator) * loudness
    part = t / t[-1]  # 0 to 1
    octaves = (0.4 + 0.8 * draw[1]) * {
        "rising": part,
        "falling": -part,
        "arch": (math.pi * part).sin(),
        "warble": 0.25 * (2 * math.pi * (4 + 4 * draw[2]) * t).sin(),
        "steps": (part * (3 + int(3 * draw[2]))).floor() % 2,
    }.get(name, torch.zeros_like(t))
    pitch = 200 * 8 ** draw[0] * 2**octaves  # Hz
    phase = 2 * math.pi * pitch.cumsum(0) / RATE
    audible = 2 * pitch < RATE / 2  # a higher overtone would alias to a low tone
    sound = phase.sin() + 0.3 * audible * (2 * phase).sin()
    if name == "chord":
        sound = sound + ((1.2 + 0.5 * draw[1]) * phase).sin()
    loudness = {
        "tremble": 1 + 0.9 * (2 * math.pi * (4 + 4 * draw[2]) * t).sin(),
        "pulses": _beats(t, 3 + 5 * draw[1]),
        "bell": (-(4 + 4 * draw[1]) * t).exp(),
    }.get(name, torch.ones_like(t))
    return sound * loudness


def _beats(t: Tensor, rate: float) -> Tensor:
    """Return 1 in the first two fifths of every beat, 0 in the rest."""
    return ((t * rate) % 1 < 0.4).to(t.dtype)


class Waves(Source):
    """Files of PCM samples, PATH/train/CLASS/x.wav, at any rate; mixed to mono and resampled to `RATE`."""

    kind = "sound"
    size = (1, 64, 128)
    flippable = False

    def __init__(self, root: str, split: str, data: Data) -> None:
        self.samples, self.classes = labelled(root, split, (".wav",), data)

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> tuple[Raw, int]:
        path, label = self.samples[index]
        try:
            return read_wave(path), label
        except (OSError, EOFError, ValueError, wave.Error) as error:
            raise OSError(f"{path}: {str(error) or type(error).__name__}") from error


def read_wave(path: str, rate: int = RATE) -> Tensor:
    """Return the sound of a file of PCM samples, mixed to mono, `[S]` at `rate` samples a second.

    Raises `wave.Error`, `EOFError`, `OSError`, or `ValueError` for what is cut off.
    """
    with wave.open(path) as file:
        channels, width, own = file.getnchannels(), file.getsampwidth(), file.getframerate()
        count, content = file.getnframes(), bytearray(file.readframes(file.getnframes()))
    there, rest = divmod(len(content), channels * width)
    if rest or there < count < _ENDLESS // (channels * width):
        raise ValueError(f"it is cut off: {there} of {count} samples are there")
    if width == 3:  # torch has no 24-bit integers: append a lowest byte of 0
        low = torch.frombuffer(content, dtype=torch.uint8).view(-1, 3) if content else torch.empty(0, 3).byte()
        sound = torch.cat((torch.zeros_like(low[:, :1]), low), dim=1).flatten().view(torch.int32) / 2**31
    else:
        kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[width]
        sound = torch.frombuffer(content, dtype=kind) if content else torch.empty(0)
        sound = (sound.float() - 128) / 128 if width == 1 else sound.float() / 2 ** (8 * width - 1)
    if not len(sound):
        raise ValueError("there are no samples")
    return resample(sound.view(-1, channels).mean(dim=1), own, rate)


def resample(sound: Tensor, rate: int, to: int = RATE) -> Tensor:
    """Resample a sound from `rate` to `to` samples a second, by its spectrum cut off at the new Nyquist frequency."""
    if rate == to:
        return sound
    length = max(1, round(len(sound) * to / rate))
    spectrum = torch.fft.rfft(sound)[: length // 2 + 1]
    resampled: Tensor = torch.fft.irfft(spectrum, n=length) * (length / len(sound))
    return resampled


class _Spectrogram:
    """Turn a sound `[S]` into `[1, M, F]`: the log power in mel bands, with mean 0 and deviation 1."""

    def __init__(self, mels: int, frames: int) -> None:
        self.frames, self.step = frames, LENGTH // frames
        self.window = torch.hann_window(_WINDOW)
        self.bank = _bank(mels)

    def __call__(self, sound: Any) -> Tensor:
        sound = torch.as_tensor(sound, dtype=torch.float32)
        # crop longer sounds to the middle, pad shorter ones with silence on both sides
        room = LENGTH - len(sound)
        sound = torch.nn.functional.pad(sound, (room // 2, room - room // 2))
        waves = torch.stft(sound, _WINDOW, self.step, window=self.window, return_complex=True)
        power = waves.abs().square()[:, : self.frames]
        level = 10 * (self.bank @ power).clamp(min=1e-10).log10()
        level = level.clamp(min=float(level.max()) - _LOUDNESS)
        return ((level - level.mean()) / (level.std() + 1e-5))[None]


def spectrogram(size: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """Return a function from a sound `[S]` to a spectrogram of `size`, (1, mels, frames), with mean 0 and deviation 1.

    It shows 2 s: the middle of a longer sound; a shorter one is padded with silence on both sides. Raises `ConfigError`
    for other sizes.
    """
    limit = _WINDOW // 2
    if len(size) != 3 or size[0] != 1 or not 1 <= size[1] <= limit or not 1 <= size[2] <= LENGTH // 8:
        raise ConfigError(
            f"data.size is {size}; spectrograms take (1, mels, frames), at most {limit} mels and {LENGTH // 8} frames."
        )
    return _Spectrogram(size[1], size[2])


def mel(hertz: Tensor) -> Tensor:
    """Return frequencies on the mel scale."""
    return 2595 * (1 + hertz / 700).log10()


def _bank(mels: int) -> Tensor:
    """Return the mel filter bank of overlapping triangles, `[M, _WINDOW // 2 + 1]`."""

    found = mel(torch.linspace(0, RATE / 2, _WINDOW // 2 + 1))  # mel value of each frequency bin
    corners = torch.linspace(0, float(found[-1]), mels + 2)
    left, middle, right = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    bank = torch.minimum((found - left) / (middle - left), (right - found) / (right - middle)).clamp(min=0)
    # low bands may be narrower than a frequency bin: an empty band takes the nearest bin
    empty = bank.sum(dim=1) == 0
    nearest = (found - middle).abs().argmin(dim=1)
    bank[empty, nearest[empty]] = 1.0
    return bank


# the names used in `sources.KINDS`
tones = Tones
wav = Waves
