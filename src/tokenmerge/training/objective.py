"""Training objectives: the loss to minimise and the sums that an evaluation reports."""

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
    """A task: `loss` of a training batch, `score` of an evaluation batch."""

    counts: tuple[str, ...] = ("loss",)  # names of the sums that `score` returns

    def targets(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the targets of a training batch in the form that `loss` takes."""
        return inputs, labels

    def net(self, model: nn.Module) -> nn.Module:
        """Return the module that `loss` calls: the model, or a module that contains it."""
        return model

    @abstractmethod
    def loss(self, net: Callable[[Tensor], Any], inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the scalar to minimise."""

    @abstractmethod
    def score(self, net: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        """Return the sums over a batch, one per name in `counts`."""


class Classify(Objective):
    """Cross-entropy of (mixed or smoothed) labels, plus the method's own loss and the distillation loss.

    Distillation follows Hinton et al., 2015, arXiv:1503.02531: softened answers, multiplied by T^2 to keep the scale of
    the gradient.
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
        if len(inputs) % 2:  # timm mixes pairs: where an unreadable sample leaves an odd number, repeat one
            inputs, labels = torch.cat((inputs, inputs[:1])), torch.cat((labels, labels[:1]))
        mixed: tuple[Tensor, Tensor] = self.mixup(inputs, labels)
        return mixed

    def net(self, model: nn.Module) -> nn.Module:
        return model if self.adding is None else _Adding(model, self.adding)

    def loss(self, net: Callable[[Tensor], Any], inputs: Tensor, targets: Tensor) -> Tensor:
        output, added = net(inputs) if self.adding else (net(inputs), 0.0)
        logits = answer(output).float()
        # mixup smooths its targets itself
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
    """A model that also returns the extra loss of its method.

    The loss is computed inside the forward, because DistributedDataParallel treats parameters that it cannot reach from
    the outputs as unused.
    """

    def __init__(self, model: nn.Module, handle: Handle) -> None:
        super().__init__()
        self.model, self.handle = model, handle

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        return answer(self.model(inputs)), self.handle.loss()


class Predict(Objective):
    """Masked autoencoding: the model returns the prediction error of the masked patches."""

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
