"""Train a method that learns which tokens go, in the reference model on Fashion-MNIST, and write what it learned."""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from train_reference import augment, load_data, normalise

import tokenmerge
from tokenmerge import assets
from tokenmerge.methods import DTEM, LTMP, NEW, AdaViT, AViT, DynamicViT, Learned, SPViT, TokenLearner

# what is left of 196 patches after three removals that each keep seven of ten
STAGES = [0, 0, 0, 59, 0, 0, 41, 0, 0, 29]


@dataclass(frozen=True)
class Setting:
    """How one method is trained; learning rates are those of its own modules and of the model around them."""

    method: Learned
    r: int | list[int]
    freeze: bool = False
    lr_modules: float = 1e-3
    lr_model: float = 1e-4


SETTINGS = {
    "dynamicvit": Setting(DynamicViT(NEW), STAGES),
    "spvit": Setting(SPViT(NEW), STAGES),
    "adavit": Setting(AdaViT(NEW), [0, 0, 0, *[16] * 8], lr_modules=5e-3),
    # the paper's shift of -10 takes its 100 epochs to be overcome
    "avit": Setting(AViT(NEW, beta=-6.0, ponder_weight=5e-3), [0, 0, 0, *[48] * 8], lr_modules=1e-2, lr_model=3e-4),
    "tokenlearner": Setting(TokenLearner(NEW), [0, 0, 0, 0, 0, 0, 180]),
    "dtem": Setting(DTEM(NEW), 13, freeze=True),
    "ltmp": Setting(LTMP(NEW), 16, freeze=True, lr_modules=5e-3),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--method", choices=SETTINGS, required=True)
    add("--out", type=Path, help="folder of checkpoints, resumed from, and of the result (runs/learned-METHOD)")
    add("--data", type=Path, help="folder with the original train-*-ubyte.gz files")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--epochs", type=float, default=2.0, help="may be a fraction")
    add("--steps", type=int, help="instead of epochs")
    add("--batch-size", type=int, default=64)
    add("--freeze", action=argparse.BooleanOptionalAction, help="train the method's modules only (by method)")
    add("--save-every", type=int, default=200, help="steps from one checkpoint, with an evaluation, to the next")
    add("--evaluate", type=int, default=1000, help="held-out training images of an evaluation")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out = args.out or Path(f"runs/learned-{args.method}")
    args.freeze = SETTINGS[args.method].freeze if args.freeze is None else args.freeze
    return args


class Run:
    """A patched model in training, with its teacher, optimiser and checkpoint."""

    def __init__(self, args: argparse.Namespace, data: dict[str, Tensor]) -> None:
        self.args, self.data, self.setting = args, data, SETTINGS[args.method]
        self.teacher = assets.reference_model().to(args.device).requires_grad_(False)
        torch.manual_seed(args.seed)
        self.model = copy.deepcopy(self.teacher).requires_grad_(not args.freeze)
        self.handle = tokenmerge.patch(self.model, self.setting.method, r=self.setting.r)
        self.modules: nn.ModuleDict = self.model.tokenmerge_modules
        own = list(self.modules.parameters())
        groups = [{"params": own, "lr": self.setting.lr_modules, "weight_decay": 0.0}]
        if not args.freeze:
            others = [p for name, p in self.model.named_parameters() if not name.startswith("tokenmerge_modules.")]
            groups.append({"params": others, "lr": self.setting.lr_model, "weight_decay": 0.05})
        self.optimizer = torch.optim.AdamW(groups)
        self.adds_loss = type(self.setting.method).loss is not Learned.loss
        self.steps = args.steps or math.ceil(args.epochs * len(data["train_labels"]) / args.batch_size)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)
        self.path, self.step = args.out / "checkpoint.pt", 0
        if self.path.exists():
            saved = torch.load(self.path, map_location=args.device, weights_only=True)
            self.step = saved["step"]
            for part in ("model", "optimizer", "schedule"):
                getattr(self, part).load_state_dict(saved[part])

    def _rate(self, step: int) -> float:
        """A linear start over a twentieth of the steps, then half a cosine."""
        start = max(1, self.steps // 20)
        return min((step + 1) / start, 0.5 + 0.5 * math.cos(math.pi * min(1.0, step / self.steps)))

    def save(self) -> None:
        state = {part: getattr(self, part).state_dict() for part in ("model", "optimizer", "schedule")}
        part_file = self.path.with_suffix(".part")
        torch.save({**state, "step": self.step}, part_file)
        part_file.replace(self.path)  # a crash in the middle of writing leaves the last good checkpoint

    def train_step(self) -> dict[str, float]:
        args, data = self.args, self.data
        torch.manual_seed(args.seed * 1_000_003 + self.step)  # so a resumed run draws what an uninterrupted one would
        # frozen: batch norm keeps its statistics too, and only the method's modules are told that this is training
        self.model.train(not args.freeze)
        self.modules.train()
        batch = torch.randint(len(data["train_labels"]), (args.batch_size,), device=args.device)
        images, labels = augment(normalise(data["train_images"][batch])), data["train_labels"][batch]
        logits = self.model(images)
        with torch.no_grad():
            wanted = self.teacher(images)
        parts = {
            "answer": F.cross_entropy(logits, labels),
            "teacher": 0.5 * F.kl_div(logits.log_softmax(-1), wanted.softmax(-1), reduction="batchmean"),
        }
        if self.adds_loss:
            parts["method"] = self.handle.loss()
        loss = sum(parts.values(), torch.zeros((), device=args.device))
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        return {"loss": loss.item(), **{name: part.item() for name, part in parts.items()}}

    def train(self) -> None:
        total, count, start = dict[str, float](), 0, time.time()
        recent: list[float] = []
        while self.step < self.steps:
            for name, value in self.train_step().items():
                total[name] = total.get(name, 0.0) + value
                recent += [value] if name == "loss" else []
            count += 1
            if self.step % 20 == 0:
                print(f"  step {self.step}/{self.steps} loss {sum(recent) / len(recent):.3f}", flush=True)
                recent.clear()
            if self.step % self.args.save_every == 0 or self.step == self.steps:
                line = {"step": self.step, "of": self.steps, **{name: value / count for name, value in total.items()}}
                line["images_per_second"] = count * self.args.batch_size / (time.time() - start)
                part = self.args.evaluate
                line |= self.evaluate(self.data["held_out_images"][:part], self.data["held_out_labels"][:part])
                self.save()
                print(line, flush=True)
                with (self.args.out / "log.jsonl").open("a", encoding="utf-8") as log:
                    log.write(json.dumps(line) + "\n")
                total, count, start = {}, 0, time.time()

    @torch.inference_mode()
    def evaluate(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """Return accuracy and mean tokens per block; image by image where the number of tokens depends on the batch."""
        self.model.eval()
        size = 1 if self.setting.method.is_adaptive else 250
        right, tokens = 0, 0.0
        for batch, answers in zip(images.split(size), labels.split(size), strict=True):
            right += int((self.model(normalise(batch)).argmax(-1) == answers).sum())
            tokens += sum(self.handle.tokens) / len(self.handle.tokens) * len(answers)
        return {"accuracy": right / len(labels), "tokens": tokens / len(labels)}

    def export(self) -> None:
        """Write the configuration with what was learned beside it, and the model's own weights where they changed."""
        self.handle.save(self.args.out / "merge.json")
        if not self.args.freeze:
            state = {key: value.detach().cpu().contiguous() for key, value in self.model.state_dict().items()}
            state = {key: value for key, value in state.items() if not key.startswith("tokenmerge_modules.")}
            save_file(state, self.args.out / "model.safetensors")


def main() -> None:
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    run = Run(args, load_data(args))
    run.train()
    run.export()
    # looked at once, by the finished model: choices are made on the held-out training images
    images, labels = (part.to(args.device) for part in assets.fashion_mnist("test"))
    found = run.evaluate(images, labels)
    print(f"test accuracy {found['accuracy']:.2%}, {found['tokens']:.1f} tokens per block")


if __name__ == "__main__":
    main()
