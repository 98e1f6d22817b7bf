"""The training loop: train a recipe to the end, with checkpoints and exact resume."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from tokenmerge.data.loader import Batch, Loader, Position, open_source, reseed, seed_of
from tokenmerge.data.prepare import choose_preprocessing, statistics_of
from tokenmerge.data.transforms import train_transform
from tokenmerge.errors import DataError, DivergedError, StoppedError, UnsupportedError
from tokenmerge.tools.models import BUNDLED, import_timm, place_of
from tokenmerge.training.build import build_network
from tokenmerge.training.checkpoint import Checkpoints
from tokenmerge.training.distributed import World
from tokenmerge.training.log import Log, Unreadable, format_r, peak_mb
from tokenmerge.training.models import VIT, check_trust, own_size
from tokenmerge.training.optimizer import Optimization
from tokenmerge.training.recipe import Recipe, from_dict
from tokenmerge.training.run_folder import alone_in, check_folder, check_recipe, last_rows, write_model, write_recipe
from tokenmerge.training.validate import HeldOut, mean_tokens

__all__ = ["DivergedError", "StoppedError", "train"]


def train(
    recipe: Recipe,
    folder: str | Path,
    *,
    device: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    trust_pickle: bool = False,
) -> list[dict[str, Any]]:
    """Train a recipe, or resume an interrupted run of it; return the metric rows of the last evaluation.

    The folder gets `recipe.json`, `metrics.jsonl` and `.csv`, `checkpoints/` and, at the end, the files that `load`
    reads. An invalid recipe, folder or data set raises a `TokenMergeError` before anything is written, and so does a
    pickled model without `trust_pickle`. Later errors keep the last good checkpoint: `DivergedError`, `StoppedError`,
    `LostRankError`, and `DataError` (full disk, unreadable data).
    """
    import_timm()
    folder = Path(folder)
    check_folder(folder, recipe)
    check_trust(recipe.model, trust_pickle)
    with World(device) as world:
        finished = last_rows(folder)
        if finished is not None:
            if world.is_first:
                print(f"finished before, in {folder}", file=sys.stderr, flush=True)
            return finished
        try:
            return _Run(recipe, folder, world, progress).run()
        except torch.OutOfMemoryError as error:
            raise UnsupportedError(
                f"the memory of {world.device} is too small: {str(error).splitlines()[0]} A larger accumulate (now "
                f"{recipe.accumulate}), model.checkpointing=true, precision=bf16 or a smaller batch_size needs less, "
                "and another --out."
            ) from error


class _Run:
    """One process of a run: from step to step, with rows of metrics, validations and checkpoints."""

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        world: World,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.recipe, self.folder, self.world = recipe, folder, world
        self.progress = progress if progress is not None and world.is_first else lambda done, total: None
        source = open_source(recipe.data.source, "train", recipe.data)
        self.size = recipe.data.size or own_size(recipe.model.name, source.kind) or source.size
        self.classes = source.classes
        # the same seed in every process, so that all build the same model
        reseed(recipe.seed)
        self.network = build_network(recipe, self.size, self.classes, world.device)
        name = recipe.model.name
        self.prepared = choose_preprocessing(
            self.network.core,
            source.kind,
            self.size,
            beside=place_of(name),
            is_own=name in (BUNDLED, VIT),
        )
        self.held = HeldOut(recipe, self.size, self.classes, self.prepared, world)
        pixels = statistics_of(self.prepared)
        self.loader = Loader(
            source,
            train_transform(recipe.augment, source.kind, self.size, flippable=source.flippable, **pixels),
            batch_size=recipe.batch_size,
            seed=recipe.seed,
            rank=world.rank,
            world=world.size,
            workers=recipe.data.workers,
        )
        self.steps = _count_steps(recipe, self.loader.steps_per_epoch)
        r = 0 if self.network.handle is None else self.network.handle.r
        self.schedule = recipe.merge.schedule(r, self.steps, recipe.seed)
        self.optimization = Optimization(self.network, recipe, self.steps, world)
        self.checkpoints = Checkpoints(folder / "checkpoints", recipe.save.keep)
        self.step, self.position, self.unreadable = 0, Position(), Unreadable()
        # sums since the last row: loss, gradient norm, steps
        self.window = torch.zeros(3, device=world.device)
        self.log: Log | None = None  # in the first process only

    def run(self) -> list[dict[str, Any]]:
        """Train from the last checkpoint to the end, evaluate, and write the model."""
        with alone_in(self.folder) if self.world.is_first else nullcontext():
            self._resume()
            if self.world.is_first:
                write_recipe(self.folder, self.recipe)
                self.log = Log(self.folder, self.step, self.steps, self.recipe.save.tensorboard)
                about = [] if self.prepared is None else self.prepared.notes(options="")
                for note in self.held.notes + self.network.notes + about:
                    print(note, file=sys.stderr, flush=True)
            if self.step < self.steps:
                self._train()
            rows = self._evaluate_all()
            weights = self.optimization.weights()
            if self.log is not None:
                self.log.write_csv()
                if self.network.handle is not None:
                    self.network.handle.r = self.schedule.r
                source = self.recipe.model.name
                write_model(self.folder, self.network, source, weights, self.size, self.classes, self.prepared)
        return rows

    def _train(self) -> None:
        save = self.recipe.save
        batches = self.loader.batches(self.position)
        start, images = time.perf_counter(), 0
        self.progress(self.step, self.steps)
        while self.step < self.steps:
            batch = next(batches)
            self._train_step(batch)
            self.step, self.position = self.step + 1, batch.position
            images += self.recipe.batch_size
            self.unreadable(batch)
            self.progress(self.step, self.steps)
            is_last = self.step == self.steps
            logs, saves = (self.step % every == 0 or is_last for every in (save.log, save.every))
            if logs:
                self._check(self.world.total(self.window))
                self._write_row(time.perf_counter() - start, images)
                start, images = time.perf_counter(), 0
            before = time.perf_counter()
            if save.evaluate and self.step % save.evaluate == 0 and not is_last:
                self._evaluate("valid", self.schedule.r)
            if saves:
                self._save()
            self._stop_if_asked()
            # evaluation and checkpoints do not count as training time
            start += time.perf_counter() - before

    def _train_step(self, batch: Batch) -> None:
        # dropout and masks depend on seed, step and rank only, so a resumed run draws the same ones
        reseed(seed_of(self.recipe.seed, self.step, self.world.rank))
        if self.network.handle is not None:
            self.network.handle.r = self.schedule.at(self.step)
        inputs, labels = (part.to(self.world.device, non_blocking=True) for part in (batch.inputs, batch.labels))
        loss, norm = self.optimization.backward(self.step, inputs, labels)
        self.window += torch.stack((loss, norm, torch.ones_like(loss)))
        # on a GPU a check at every step would force a synchronisation
        if self.world.device.type == "cpu":
            self._check(self.window, self.step + 1)
        self.optimization.update(self.step)

    def _check(self, window: torch.Tensor, step: int | None = None) -> None:
        """Raise `DivergedError` if a loss or gradient was not finite in any step up to `step`, the last by default."""
        loss, norm, _ = window.tolist()
        if math.isfinite(loss) and math.isfinite(norm) and not self.optimization.overflows:
            return
        step = step or self.step
        what = "gradient" if math.isfinite(loss) else "loss"
        paths = self.checkpoints.paths()
        kept = f"The last good checkpoint is {paths[0]}" if paths else "There is no checkpoint yet"
        raise DivergedError(
            f"the {what} is no number at step {step} (learning rate {self.optimization.lr:.3g}, r "
            f"{format_r(self.schedule.at(step - 1))}). {kept}. A lower optimizer.lr, a longer optimizer.warmup or a "
            "clip of the gradient helps; a changed recipe needs another --out."
        )

    def _write_row(self, seconds: float, images: int) -> None:
        """Write a row of metrics for the steps since the last one."""
        loss, norm, count = self.world.mean(self.window).tolist()
        self.window.zero_()
        if self.log is not None:
            self.log.add(
                self.step,
                "train",
                loss=loss / count,
                gradient=norm / count,
                r=format_r(self.schedule.at(self.step - 1)),
                tokens=mean_tokens(self.network.handle),
                lr=self.optimization.lr,
                scale=self.optimization.scale,
                images_per_second=images / seconds,
                peak_memory_mb=peak_mb(self.world.device),
                seconds=seconds,
            )

    def _evaluate_all(self) -> list[dict[str, Any]]:
        """Evaluate the finished model as trained, and on the test split also without merging."""
        splits, r = self.held.sources, self.schedule.r
        rows = [self._evaluate("valid", r)] if "valid" in splits else []
        if "test" in splits:
            merges = self.network.handle is not None and r != 0
            rows += [self._evaluate("test", amount) for amount in ([r, 0] if merges else [r])]
        return rows

    def _evaluate(self, split: str, r: Any) -> dict[str, Any]:
        row = self.held.evaluate(split, self.optimization.model, self.network.objective, r, self.unreadable)
        return row if self.log is None else self.log.add(self.step, split, **row)

    def _save(self) -> None:
        """Write a checkpoint: all processes contribute their state, the first one writes it."""
        window = self.world.total(self.window)
        self._check(window)
        state = self.optimization.state_dict()
        if self.log is None:
            return
        self.log.write_csv()
        about = {
            "step": self.step,
            "position": [self.position.epoch, self.position.index],
            "window": (window / self.world.size).cpu(),
            "unreadable": list(self.unreadable.sentences),
            "recipe": self.recipe.as_dict(),
        }
        self.checkpoints.save(self.step, state | about)

    def _resume(self) -> None:
        """Load the last checkpoint, if there is one."""
        saved = self.checkpoints.load()
        if saved is None:
            return
        check_recipe(self.folder, from_dict(saved["recipe"]), self.recipe)
        try:
            self.optimization.load_state_dict(saved)
        except (KeyError, RuntimeError, ValueError) as error:
            raise DataError(
                f"the checkpoint {self.checkpoints.paths()[0]} is of another model, or the data has other classes than "
                f"when it was written: {' '.join(str(error).split())}. Give another folder (--out) to start anew."
            ) from error
        self.window = saved["window"].to(self.world.device)
        self.unreadable = Unreadable(saved["unreadable"])
        self.step, self.position = saved["step"], Position(*saved["position"])
        if self.world.is_first:
            print(f"going on after step {self.step} of {self.steps}", file=sys.stderr, flush=True)

    def _stop_if_asked(self) -> None:
        asked = self.world.asked_to_stop
        # all processes must stop at the same step; they agree on it in a collective that runs anyway
        if self.world.size > 1:
            if self.step % self.recipe.save.log:
                return
            asked = bool(self.world.total(torch.tensor(float(asked), device=self.world.device)))
        if asked:
            self._save()
            error = StoppedError(
                f"stopped by {self.world.signal} after step {self.step} of {self.steps}: saved at step {self.step}, "
                "the same command goes on from there."
            )
            error.exit_code = 130 if self.world.signal == "SIGINT" else 2
            raise error


def _count_steps(recipe: Recipe, per_epoch: int | None) -> int:
    if recipe.steps is not None:
        return recipe.steps
    if per_epoch is None:
        raise DataError(f"{recipe.data.source} is a stream: nobody knows how long an epoch is. Give steps.")
    assert recipe.epochs is not None
    return max(1, round(recipe.epochs * per_epoch))
