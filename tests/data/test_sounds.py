"""Sources of sounds: tones that are what their label says, wav files of every kind, and spectrograms."""

from __future__ import annotations

import math
import struct
import wave
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers import assert_close
from tokenmerge.data.sounds import LENGTH, RATE, resample, spectrogram, tones, wav
from tokenmerge.errors import ConfigError
from tokenmerge.training.recipe import Data


def sine(hertz: float, seconds: float = 2.0, rate: int = RATE) -> Tensor:
    return 0.5 * (2 * math.pi * hertz * torch.arange(int(seconds * rate)) / rate).sin()


def pitch(sound: Tensor) -> float:
    """The frequency with the most power."""
    return float(torch.fft.rfft(sound).abs()[1:].argmax() + 1) * RATE / len(sound)


def test_tones_are_always_the_same_and_splits_differ() -> None:
    train, test = (tones("", split, Data()) for split in ("train", "test"))
    assert len(train) == 20_000 and len(test) == 2_000 and train.kind == "sound"
    state = torch.get_rng_state()
    sound, label = train.read(7)
    assert torch.equal(torch.get_rng_state(), state)
    assert sound.shape == (LENGTH,) and sound.dtype == torch.float32
    again = tones("", "train", Data()).read(7)
    assert torch.equal(again[0], sound) and again[1] == label
    assert not torch.equal(test.read(7)[0], sound)
    labels = torch.tensor([train.read(index)[1] for index in range(0, 600, 2)])
    assert labels.bincount(minlength=12).min() > 10  # every second sample alone has all classes


def test_tones_differ_in_what_their_class_says() -> None:
    source = tones("", "train", Data())
    found: dict[str, list[float]] = {name: [] for name in source.classes}
    bank = spectrogram((1, 64, 128))
    for index in range(400):
        sound, label = source.read(index)
        x = bank(sound)[0]
        band = x.argmax(dim=0)
        loud = (x - x.median(dim=1, keepdim=True).values).amax(dim=0) > 2.5
        if loud.sum() > 40 and x.max() > 4:
            places = band[loud].float()
            found[source.classes[label]].append(float(places[-8:].mean() - places[:8].mean()))
    mean = {name: sum(moves) / len(moves) for name, moves in found.items() if len(moves) >= 3}
    assert {"steady", "rising", "falling"} <= mean.keys()
    assert abs(mean["steady"]) < 1.5 and mean["rising"] > 4 and mean["falling"] < -4


def write(path: Path, sound: Tensor, rate: int = RATE, width: int = 2, channels: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = (sound * (2 ** (8 * width - 1) - 1)).round().long().tolist()
    if width == 1:
        content = bytes(value + 128 for value in whole)
    else:
        content = b"".join(struct.pack("<q", value)[:width] for value in whole)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(content)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_wav_files_of_every_width(width: int, tmp_path: Path) -> None:
    sound = sine(440, 0.1)
    write(tmp_path / "train" / "a" / "x.wav", sound, width=width)
    read, label = wav(str(tmp_path), "train", Data()).read(0)
    assert label == 0
    assert_close(read, sound, 0.02 if width == 1 else 1e-4)


def test_channels_are_averaged_and_rates_made_one(tmp_path: Path) -> None:
    both = torch.stack((sine(440, rate=22_050), sine(440, rate=22_050) * 0.5), dim=1).flatten()
    write(tmp_path / "train" / "a" / "x.wav", both, rate=22_050, channels=2)
    read, _ = wav(str(tmp_path), "train", Data()).read(0)
    assert len(read) == LENGTH and pitch(read) == pytest.approx(440, abs=1)
    assert_close(read[1000:-1000], 0.75 * sine(440)[1000:-1000], 0.02)


@pytest.mark.parametrize("rate", [4_000, 11_025, 44_100])
def test_resampling_keeps_what_both_rates_hold(rate: int) -> None:
    assert_close(resample(sine(440, rate=rate), rate), sine(440), 0.05)
    if rate > RATE:  # 5,000 Hz is more than 8,000 samples a second hold: nothing is left, nothing comes back lower
        assert resample(sine(5_000, rate=rate), rate).abs()[200:-200].max() < 0.01


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "train" / "a"
    write(folder / "empty.wav", torch.empty(0))
    (folder / "noise.wav").write_bytes(b"no sound at all")
    (folder / "nothing.wav").touch()
    write(folder / "short.wav", sine(440, 0.1))
    (folder / "short.wav").write_bytes((folder / "short.wav").read_bytes()[:30])
    source = wav(str(tmp_path), "train", Data())
    assert len(source) == 4
    for index, name in enumerate(("empty", "noise", "nothing", "short")):
        with pytest.raises(OSError, match=rf"a/{name}\.wav: \w"):
            source.read(index)


@pytest.mark.parametrize("size", [(1, 64, 128), (1, 128, 200), (1, 16, 30)])
def test_a_spectrogram_has_its_size_mean_and_deviation(size: tuple[int, ...]) -> None:
    x = spectrogram(size)(sine(440) + 0.01 * torch.randn(LENGTH))
    assert x.shape == size and x.dtype == torch.float32
    assert abs(float(x.mean())) < 1e-4 and abs(float(x.std()) - 1) < 1e-3


def test_a_spectrogram_shows_pitch_time_and_no_loudness() -> None:
    show = spectrogram((1, 64, 128))
    bands = [int(show(sine(hertz))[0, :, 10:-10].mean(dim=1).argmax()) for hertz in (100, 440, 1_000, 3_000)]
    assert bands == sorted(set(bands))
    # mel of 1,000 Hz over mel of 4,000 Hz
    assert bands[2] == pytest.approx(64 * math.log(1 + 1_000 / 700) / math.log(1 + 4_000 / 700), abs=1.5)
    late = sine(440)
    late[: LENGTH // 2] = 0
    x = show(late)[0]
    assert x[:, 70:120].amax() > x[:, :58].amax() + 1
    noise = 0.001 * torch.randn(LENGTH)
    assert_close(show(0.1 * (sine(440) + noise)), show(sine(440) + noise), 1e-3)


def test_short_sounds_stand_amid_silence_and_long_ones_are_cut() -> None:
    show = spectrogram((1, 64, 128))
    x = show(sine(440, 1.0))[0].amax(dim=0)
    assert x[40:88].min() > x[:28].max() and x[40:88].min() > x[100:].max()
    long = torch.cat((sine(1_000), sine(440), sine(1_000)))
    assert_close(show(long)[..., 3:-3], show(sine(440))[..., 3:-3], 0.5)
    assert show(torch.zeros(10)).isfinite().all()


@pytest.mark.parametrize("size", [(3, 64, 128), (64, 128), (1, 129, 128), (1, 64, 0)])
def test_sizes_that_no_spectrogram_has(size: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="spectrograms take"):
        spectrogram(size)
