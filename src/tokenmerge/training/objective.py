"""What a training makes smaller, and what its evaluation counts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenmerge import Handle
from tokenmerge.measure.outputs import answer
from tokenmerge.methods import Learned
from tokenmerge.training.recipe import Augment, Recipe

__all__ = ["Classify", "Objective", "Predict"]


class Objective(ABC):
    """One task: `loss` of a training batch, `score` of a batch of an evaluation."""

    counts: tuple[str, ...] = ("loss",)  # what `score` sums up

    def targets(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return a training batch as the loss takes it."""
        return inputs, labels

    def net(self, model: nn.Module) -> nn.Module:
        """Return what `loss` calls: the model, or what has it inside."""
        return model

    @abstractmethod
    def loss(self, net: Callable[[Tensor], Any], inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the scalar to be made smaller."""

    @abstractmethod
    def score(self, net: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        """Return the sums over a batch, one for each of `counts`."""


class Classify(Objective):
    """Cross-entropy of the labels (mixed or smoothed), the method's own loss, and the divergence from a teacher.

    Distillation as Hinton et al., 2015, arXiv:1503.02531: softened answers, the gradient's scale kept.
    """

    counts = ("loss", "accuracy")

    def __init__(self, recipe: Recipe, classes: int, handle: Handle, teacher: nn.Module | None) -> None:
        self.distill, self.smoothing, self.teacher = recipe.distill, recipe.augment.smoothing, teacher
        self.mixup = _mixup(recipe.augment, classes)
        method = handle.config.method
        self.adding = handle if isinstance(method, Learned) and method.adds_loss else None

    def targets(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if self.mixup is None:
            return inputs, labels
        if len(inputs) % 2:  # one could not be read, and timm mixes pairs: one is there twice
            inputs, labels = torch.cat((inputs, inputs[:1])), torch.cat((labels, labels[:1]))
        mixed: tuple[Tensor, Tensor] = self.mixup(inputs, labels)
        return mixed

    def net(self, model: nn.Module) -> nn.Module:
        return model if self.adding is None else _Adding(model, self.adding)

    def loss(self, net: Callable[[Tensor], Any], inputs: Tensor, targets: Tensor) -> Tensor:
        output, added = net(inputs) if self.adding else (net(inputs), 0.0)
        logits = answer(output).float()
        # mixed targets are smoothed already
        smoothing = 0.0 if self.mixup is not None else self.smoothing
        loss = F.cross_entropy(logits, targets, label_smoothing=smoothing)
        if self.teacher is not None:
            T = self.distill.temperature
            with torch.no_grad():
                wanted = (answer(self.teacher(inputs)).float() / T).softmax(-1)
            divergence = F.kl_div((logits / T).log_softmax(-1), wanted, reduction="batchmean")
            loss = loss + self.distill.weight * T * T * divergence
        return loss + added

    def score(self, net: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        logits = answer(net(inputs)).float()
        return torch.stack((F.cross_entropy(logits, labels, reduction="sum"), (logits.argmax(-1) == labels).sum()))


class _Adding(nn.Module):
    """A model that hands out what its method adds to the loss, too.

    Within the forward: what DistributedDataParallel does not find behind the outputs, it takes as unused.
    """

    def __init__(self, model: nn.Module, handle: Handle) -> None:
        super().__init__()
        self.model, self.handle = model, handle

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        return answer(self.model(inputs)), self.handle.loss()


class Predict(Objective):
    """What a masked autoencoder returns: the error of the masked patches."""

    def loss(self, net: Callable[[Tensor], Any], inputs: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = net(inputs)
        return loss

    def score(self, net: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = net(inputs).float() * len(inputs)
        return loss.unsqueeze(0)


def _mixup(augment: Augment, classes: int) -> Any:
    if not augment.mixup and not augment.cutmix:
        return None
    from timm.data import Mixup

    return Mixup(augment.mixup, augment.cutmix, label_smoothing=augment.smoothing, num_classes=classes)
