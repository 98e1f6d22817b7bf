"""Compare the outputs of a reduced model with the labels and with the outputs of the unmerged model."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from tokenmerge.data.labelled import Labelled
from tokenmerge.errors import DataError
from tokenmerge.measure.outputs import declared_classes

__all__ = ["Judge", "Question", "answers_pixels", "standard_error"]


class Question:
    """Which figures apply to a model's outputs: accuracy on labelled classes, or only distance to the unmerged outputs.

    `note` says why accuracy does not apply, "" if it does. With `keeps_embeddings` judges keep the embeddings of the
    images, for `retrieval`: an answer of one vector for each image, or of `embedded` from all tokens.
    """

    keeps_embeddings = False

    def __init__(self, model: nn.Module, data: Labelled, shape: tuple[int, ...]) -> None:
        self.shape = shape[1:]
        outputs = data.outputs
        self.has_classes = len(shape) == 2 and shape[1] == outputs
        self.has_pixels = answers_pixels(model, shape)
        self.note = "" if self.has_classes else self._why(type(model).__qualname__, outputs)

    def _why(self, name: str, outputs: int) -> str:
        if self.has_pixels:
            return (
                f"{name} answers with a class for each of {self.shape[1]} x {self.shape[2]} pixels: agreement % is the "
                "share of pixels with the same class as unmerged, error % the distance of the answers relative to "
                "their length, cosine the mean similarity. No accuracy: these labels are not of pixels."
            )
        shown = " x ".join(map(str, self.shape)) or "1"
        # data without labels has one class
        there = f", the data has {outputs} classes" if outputs > 1 else ""
        reason = f"{name} answers with {shown} numbers for an image{there}"
        return (
            f"No accuracy: {reason}: these answers are no classes of these images. They are compared with the unmerged "
            "model's: error % is the distance relative to their length, cosine the mean similarity."
        )

    def embedded(self, answers: Tensor, tokens: int, protected: int) -> Tensor | None:
        """Return the embeddings `[B, C]` in answers: vectors, or the first token of `[B, tokens, C]` or their mean.

        The first token is taken if it is a class token (`protected`). None for classes, pixels and others.
        """
        if self.has_classes or self.has_pixels or len(self.shape) > 2 or self.shape[-1] < 2:
            return None
        if len(self.shape) == 1:
            return answers
        if self.shape[0] != tokens:
            return None
        return answers[:, 0] if protected else answers.mean(dim=1)

    def check(self, got: Tensor, expected: Tensor) -> None:
        """Raise `DataError` if merged outputs cannot be compared with unmerged ones."""
        if got.shape != expected.shape:
            raise DataError(
                f"merged, the model answers with {tuple(got.shape)}, unmerged with {tuple(expected.shape)}: it hands "
                "out its tokens. Have them put back in their places: restore='dense' (--restore dense)."
            )


class Judge:
    """Sums over batches that compare one reduced model with labels and unmerged outputs; `figures` are the means.

    `hits` and `same` say of each image whether its first class is right, and that of the unmerged model; `same` is the
    share of its pixels that keep their class where `answers_pixels`. The label -1 is none: without others there are no
    accuracies. `embeddings` are those that the trial keeps.
    """

    def __init__(self, question: Question) -> None:
        self.question = question
        self.seen = self.pixels = self.odd = self.labelled = 0
        self.top1 = self.top5 = self.agree = 0
        self.divergence = self.error = self.cosine = 0.0
        self.hits: list[bool] = []
        self.same: list[float] = []
        self.embeddings: list[Tensor] = []
        self._losses: list[Tensor] = []  # of each image, in float64
        self._lengths: list[Tensor] = []

    @property
    def damage(self) -> Tensor:
        """The damage to each image, `|y - y0|^2 / mean |y0|^2`, `[images]` float64.

        The same for classes: their KL divergence is dominated by the few images that the model is unsure of.
        """
        return torch.cat(self._losses) / torch.cat(self._lengths).mean().clamp_min(1e-24)

    def add(self, got: Tensor, expected: Tensor, labels: Tensor) -> None:
        """Add one batch: outputs of the model, outputs of the unmerged model, labels."""
        self.question.check(got, expected)
        got, expected = got.float(), expected.float()
        self.seen += len(got)
        self.labelled += int((labels >= 0).sum())
        self._losses.append((got - expected).double().flatten(1).square().sum(dim=1).cpu())
        self._lengths.append(expected.double().flatten(1).square().sum(dim=1).cpu())
        # NaN ranks first, equals nothing and spreads: its images are right in nothing, and in no sum
        is_number = ~(got.isnan() | expected.isnan()).flatten(1).any(dim=1)
        numbers = int(is_number.sum())
        self.odd += len(got) - numbers
        if numbers < len(got):
            if self.question.has_classes or self.question.has_pixels:
                self.pixels += (len(got) - numbers) * got[0, 0].numel()
            got, expected, labels = got[is_number], expected[is_number], labels[is_number]
        if self.question.has_classes:
            ranked = got.topk(min(5, got.shape[1]), dim=1).indices  # [B, 5]
            hits = ranked == labels[:, None]
            same = ranked[:, 0] == expected.argmax(dim=1)
            self.hits += hits[:, 0].tolist()
            self.same += same.tolist()
            self.top1 += int(hits[:, 0].sum())
            self.top5 += int(hits.any(dim=1).sum())
            self.agree += int(same.sum())
            self.pixels += len(got)
            logs = got.log_softmax(dim=1), expected.log_softmax(dim=1)
            self.divergence += nn.functional.kl_div(*logs, log_target=True, reduction="sum").item()
            return
        if self.question.has_pixels:
            same = got.argmax(dim=1) == expected.argmax(dim=1)
            self.agree, self.pixels = self.agree + int(same.sum()), self.pixels + same.numel()
            self.same += same.flatten(1).double().mean(dim=1).tolist()
        flat, wanted = got.flatten(1), expected.flatten(1)
        # summed in float64: in float32 the cosine of maps of millions of numbers comes out above 1
        length, own = (torch.linalg.vector_norm(x, dim=1, dtype=torch.float64).clamp_min(1e-12) for x in (wanted, flat))
        distance = torch.linalg.vector_norm(flat - wanted, dim=1, dtype=torch.float64)
        self.error += float((distance / length).sum())
        self.cosine += float(((flat * wanted).sum(dim=1, dtype=torch.float64) / (length * own)).sum())

    @property
    def note(self) -> str:
        """How many answers are no numbers; "" for none."""
        if not self.odd:
            return ""
        said = f"the answers to {self.odd} of {self.seen} images hold NaN, merged or not"
        return f"{said}: they count as wrong, and distances leave them out."

    def figures(self) -> dict[str, float | None]:
        """Return the means; None for figures that do not apply."""
        found: dict[str, Any] = dict.fromkeys(
            ("top-1 %", "top-1 ±", "top-5 %", "agreement %", "KL", "error %", "cosine")
        )
        numbers = self.seen - self.odd
        if self.pixels:
            found["agreement %"] = round(100 * self.agree / self.pixels, 2)
        if self.question.has_classes:
            if self.labelled:
                found["top-1 %"] = round(100 * self.top1 / self.seen, 2)
                found["top-1 ±"] = standard_error(self.top1, self.seen)
                found["top-5 %"] = round(100 * self.top5 / self.seen, 2)
            if numbers:
                found["KL"] = float(f"{max(0.0, self.divergence / numbers):.4g}")
        elif numbers:
            found["error %"] = float(f"{100 * self.error / numbers:.4g}")
            found["cosine"] = round(self.cosine / numbers, 5)
        return found


def standard_error(hits: int, seen: int) -> float:
    """Return the standard error, in percentage points, of an accuracy on this many images.

    With 0 % or 100 %, half an image counts as the other case, since the true error is not 0.
    """
    share = (hits + 0.5) / (seen + 1) if hits in (0, seen) else hits / seen
    return round(100 * math.sqrt(share * (1 - share) / seen), 2)


def answers_pixels(model: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether answers of this shape, `[B, classes, H, W]`, are a class for every pixel.

    The name of the model's class says it (Segmentation, Segmenter): a map of features has the same shape.
    """
    return len(shape) == 4 and shape[1] > 1 and "Segment" in type(model).__name__ and declared_classes(model) is None
