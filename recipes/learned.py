"""Train the reference model on Fashion-MNIST together with a reduction method, and write what was learned."""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from train_reference import augment, load_data, normalise

import tokenmerge
from tokenmerge import assets
from tokenmerge.methods import DTEM, LTMP, NEW, AdaViT, AViT, DynamicViT, Learned, Reduction, SPViT, TokenLearner, ToMe


@dataclass(frozen=True)
class Setting:
    """How one method is trained; learning rates are those of its own modules and of the model around them."""

    method: Reduction
    r: int | list[int]
    freeze: bool = False
    lr_modules: float = 2e-3
    lr_model: float = 2e-4
    steps: int = 600


SETTINGS = {
    # before blocks 4, 7 and 10, for about the share of MACs that the papers leave of DeiT-S: 0.63, and 0.57
    "dynamicvit": Setting(DynamicViT(NEW), [0, 0, 0, 59, 0, 0, 41, 0, 0, 29]),
    "spvit": Setting(SPViT(NEW), [0, 0, 0, 70, 0, 0, 45, 0, 0, 29]),
    # the paper's shift of -10 takes its 100 epochs to be overcome
    "avit": Setting(AViT(NEW, beta=-6.0, target=0.6), [0, 0, 0, *[48] * 8], lr_modules=1e-2),
    # nothing of its own: the model alone learns to do with fewer tokens
    "tome": Setting(ToMe(), 13),
    # r is also the most: aimed lower, since images that want more do not make up for those that want less. A sublayer
    # that is off saves nothing here
    "adavit": Setting(AdaViT(NEW, usage=1.0), [0, 0, *[20] * 9], lr_modules=5e-3, steps=400),
    # the keys of this model are much alike, and 1 / 197 is the mean attention: steps and borders are as fine as that
    "ltmp": Setting(LTMP(NEW, merge_at=0.98, temperature=0.01, flops=0.57), 24, freeze=True, lr_modules=4e-4, steps=60),
    "dtem": Setting(DTEM(NEW), 13, freeze=True, steps=200),
    "tokenlearner": Setting(TokenLearner(NEW), [0, 0, 0, 0, 0, 0, 180]),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--method", choices=SETTINGS, required=True)
    add("--out", type=Path, help="folder of checkpoints, resumed from, and of the result (runs/learned-METHOD)")
    add("--data", type=Path, help="folder with the original train-*-ubyte.gz files")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--steps", type=int, help="batches to train on (by method)")
    add("--batch-size", type=int, default=32)
    add("--freeze", action=argparse.BooleanOptionalAction, help="train the method's modules only (by method)")
    add("--save-every", type=int, default=150, help="steps from one checkpoint, with an evaluation, to the next")
    add("--evaluate", type=int, default=1000, help="held-out training images of an evaluation")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out = args.out or Path(f"runs/learned-{args.method}")
    args.steps = args.steps or SETTINGS[args.method].steps
    args.freeze = SETTINGS[args.method].freeze if args.freeze is None else args.freeze
    if args.freeze and not isinstance(SETTINGS[args.method].method, Learned):
        parser.error(f"--freeze leaves nothing to train: {args.method} has no modules of its own")
    return args


class Run:
    """A patched model in training, with its teacher, optimiser and checkpoint."""

    def __init__(self, args: argparse.Namespace, data: dict[str, Tensor]) -> None:
        self.args, self.data, self.setting = args, data, SETTINGS[args.method]
        self.teacher = assets.reference_model().to(args.device).requires_grad_(False)
        torch.manual_seed(args.seed)
        self.model = copy.deepcopy(self.teacher).requires_grad_(not args.freeze)
        self.handle = tokenmerge.patch(self.model, self.setting.method, r=self.setting.r)
        self.places = self.model.num_prefix_tokens + self.model.patch_embed.num_patches
        self.modules: nn.ModuleDict = getattr(self.model, "tokenmerge_modules", nn.ModuleDict())
        own = list(self.modules.parameters())
        groups = [{"params": own, "lr": self.setting.lr_modules, "weight_decay": 0.0}]
        if not args.freeze:
            others = [p for name, p in self.model.named_parameters() if not name.startswith("tokenmerge_modules.")]
            groups.append({"params": others, "lr": self.setting.lr_model, "weight_decay": 0.05})
        self.optimizer = torch.optim.AdamW(groups)
        method = self.setting.method
        self.adds_loss = isinstance(method, Learned) and type(method).loss is not Learned.loss
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)
        self.path, self.step = args.out / "checkpoint.pt", 0
        if self.path.exists():
            saved = torch.load(self.path, map_location=args.device, weights_only=True)
            self.step = saved["step"]
            for part in ("model", "optimizer", "schedule"):
                getattr(self, part).load_state_dict(saved[part])

    def _rate(self, step: int) -> float:
        """A linear start over a twentieth of the steps, then half a cosine."""
        steps = self.args.steps
        return min((step + 1) / max(1, steps // 20), 0.5 + 0.5 * math.cos(math.pi * min(1.0, step / steps)))

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
        while self.step < self.args.steps:
            for name, value in self.train_step().items():
                total[name] = total.get(name, 0.0) + value
                recent += [value] if name == "loss" else []
            count += 1
            if self.step % 20 == 0:
                print(f"  step {self.step}/{self.args.steps} loss {sum(recent) / len(recent):.3f}", flush=True)
                recent.clear()
            if self.step % self.args.save_every == 0 or self.step == self.args.steps:
                line: dict[str, Any] = {"step": self.step, "of": self.args.steps}
                line |= {name: value / count for name, value in total.items()}
                line["images_per_second"] = count * self.args.batch_size / (time.time() - start)
                part = self.args.evaluate
                line |= self.evaluate(self.data["held_out_images"][:part], self.data["held_out_labels"][:part])
                self.save()
                self.log(line)
                total, count, start = {}, 0, time.time()

    def log(self, line: dict[str, Any]) -> None:
        print(line, flush=True)
        with (self.args.out / "training_log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    @torch.inference_mode()
    def evaluate(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """Return accuracy, mean tokens per block and the blocks' share of MACs.

        Image by image where the number of tokens depends on the batch.
        """
        self.model.eval()
        size = 1 if self.setting.method.is_adaptive else 250
        right, tokens, macs = 0, 0.0, 0.0
        for batch, answers in zip(images.split(size), labels.split(size), strict=True):
            right += int((self.model(normalise(batch)).argmax(-1) == answers).sum())
            left = self.handle.tokens
            tokens += sum(left) / len(left) * len(answers)
            macs += self._macs(left) / self._macs([self.places] * len(left)) * len(answers)
        return {"accuracy": right / len(labels), "tokens": tokens / len(labels), "macs": macs / len(labels)}

    def _macs(self, left: list[int]) -> int:
        """Return the MACs of the blocks, divided by the width C: attention over what enters, MLP over what is left."""
        C = self.model.embed_dim
        pairs = zip([self.places, *left], left, strict=False)
        return sum((4 * C + 2 * n) * n + 8 * C * after for n, after in pairs)

    def export(self) -> None:
        """Write the configuration with what was learned beside it, and the model where it changed; read both back."""
        folder = self.args.out
        self.handle.save(folder / "merge.json")
        model = assets.reference_model()
        if not self.args.freeze:
            self.handle.remove()
            state = {key: value.detach().cpu().contiguous() for key, value in self.model.state_dict().items()}
            state = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
            save_file(state, folder / "model.safetensors")
            model.load_state_dict(load_file(folder / "model.safetensors"))
        self.model = model.to(self.args.device)
        self.handle = tokenmerge.patch(self.model, tokenmerge.MergeConfig.load(folder / "merge.json"))


def main() -> None:
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    run = Run(args, load_data(args))
    run.train()
    run.export()
    # looked at once, by the finished model: choices are made on the held-out training images
    images, labels = (part.to(args.device) for part in assets.fashion_mnist("test"))
    found = run.evaluate(images, labels)
    run.log({"step": run.step, "split": "test", **found})
    share = f"{found['tokens']:.1f} tokens per block, {found['macs']:.1%} of the MACs"
    print(f"test accuracy {found['accuracy']:.2%}, {share}")


if __name__ == "__main__":
    main()
