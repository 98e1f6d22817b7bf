"""The training loop: train a recipe to the end, with checkpoints and exact resume."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from tokenmerge.data.loader import Batch, Loader, Position, open_source, reseed, seed_of
from tokenmerge.data.transforms import train_transform
from tokenmerge.errors import DataError, TokenMergeError, UnsupportedError
from tokenmerge.tools.models import import_timm
from tokenmerge.training.step_schedule import Amount
from tokenmerge.training.checkpoint import Checkpoints
from tokenmerge.training.validate import HeldOut, autocast, mean_tokens, shown
from tokenmerge.training.log import Log, peak_mb
from tokenmerge.training.models import check_trust, own_size
from tokenmerge.training.run_folder import alone_in, check_folder, check_recipe, export, last_rows, write_recipe
from tokenmerge.training.build import build_parts, optimizer_of, scheduler_of, set_training
from tokenmerge.training.preparation import preparation, statistics_of
from tokenmerge.training.recipe import Recipe, from_dict
from tokenmerge.training.distributed import World

__all__ = ["DivergedError", "StoppedError", "train"]


class DivergedError(TokenMergeError):
    """The loss or the gradient is no longer finite."""


class StoppedError(TokenMergeError):
    """The run was stopped by a signal and can be resumed."""

    exit_code = 2  # exit code of the command


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
        found = last_rows(folder)
        if found is not None:
            if world.is_first:
                print(f"finished before, in {folder}", file=sys.stderr, flush=True)
            return found
        try:
            return _Run(recipe, folder, world, progress).run()
        except torch.OutOfMemoryError as error:
            raise UnsupportedError(
                f"the memory of {world.device} is too small: {str(error).splitlines()[0]} A larger accumulate (now "
                f"{recipe.accumulate}), model.checkpointing=true, precision=bf16 or a smaller batch_size needs less, "
                "and another --out."
            ) from error


_LEAST_SCALE = 1e-6  # of the fp16 loss scale: no real loss needs a smaller one
# keyed by parameter name, so that a run with another number of processes can load it
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class _Run:
    """One process of a run: the model, its optimiser and schedule, and the training progress."""

    def __init__(self, recipe: Recipe, folder: Path, world: World, progress: Callable[[int, int], None] | None) -> None:
        self.recipe, self.folder, self.world = recipe, folder, world
        self.progress = progress if progress is not None and world.is_first else lambda done, total: None
        source = open_source(recipe.data.source, "train", recipe.data)
        self.size = recipe.data.size or own_size(recipe.model.name, source.kind) or source.size
        self.classes = source.classes
        # the same seed in every process, so that all build the same model
        reseed(recipe.seed)
        self.parts = build_parts(recipe, self.size, len(self.classes), world.device, self.classes)
        self.prepared = preparation(self.parts.core, recipe.model.name, source.kind, self.size)
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
        self.steps = self._count_steps()
        self.amount = Amount(
            self.parts.r,
            self.steps,
            warmup=recipe.merge.warmup,
            draw=recipe.merge.draw,
            off=recipe.merge.off,
            seed=recipe.seed,
        )
        self.ema = self._average()
        has_modules = hasattr(self.parts.core, "tokenmerge_modules")
        net = world.wrap(self.parts.model, self.parts.objective.net, recipe.parallel, find_unused=has_modules)
        self.net = torch.compile(net) if recipe.model.compile else net
        self.optimizer = optimizer_of(self.parts.model, recipe)
        self.scheduler = scheduler_of(self.optimizer, recipe, self.steps)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=recipe.precision == "fp16")
        self.checkpoints = Checkpoints(folder / "checkpoints", recipe.save.keep)
        self.step, self.position = 0, Position()
        # sums since the last line: loss, gradient norm, steps
        self.window = torch.zeros(3, device=world.device)
        self.unreadable: dict[str, None] = {}
        self.log: Log | None = None  # in the first process only

    def _count_steps(self) -> int:
        per_epoch, recipe = self.loader.steps_per_epoch, self.recipe
        if recipe.steps is not None:
            return recipe.steps
        if per_epoch is None:
            raise DataError(f"{recipe.data.source} is a stream: nobody knows how long an epoch is. Give steps.")
        assert recipe.epochs is not None
        return max(1, round(recipe.epochs * per_epoch))

    def _average(self) -> Any:
        if not self.recipe.ema:
            return None
        from timm.utils import ModelEmaV3

        is_sharded = self.recipe.parallel == "fsdp"
        # sharded tensors have no foreach operations
        found = ModelEmaV3(self.parts.model, decay=self.recipe.ema, use_warmup=True, foreach=not is_sharded)
        if is_sharded:
            self.world.shard(found.module)
        return found

    def run(self) -> list[dict[str, Any]]:
        """Train from the last checkpoint to the end, evaluate, and write the model."""
        with alone_in(self.folder) if self.world.is_first else nullcontext():
            self._resume()
            if self.world.is_first:
                write_recipe(self.folder, self.recipe)
                self.log = Log(self.folder, self.step, self.steps, self.recipe.save.tensorboard)
            about = [] if self.prepared is None else self.prepared.notes(options="")
            for note in self.held.notes + self.parts.notes + about:
                self._say(note)
            if self.step < self.steps:
                self._train()
            found = self._evaluate_all()
            self._export()
        return found

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
            self._name_unreadable(batch)
            self.progress(self.step, self.steps)
            is_last = self.step == self.steps
            logs, saves = (self.step % every == 0 or is_last for every in (save.log, save.every))
            if logs:
                self._check(self.world.total(self.window), self.step)
                self._line(time.perf_counter() - start, images)
                start, images = time.perf_counter(), 0
            before = time.perf_counter()
            if save.evaluate and self.step % save.evaluate == 0 and not is_last:
                self._evaluate("valid", self.parts.r)
            if saves:
                self._save()
            self._stop_if_asked()
            # evaluation and checkpoints do not count as training time
            start += time.perf_counter() - before

    def _train_step(self, batch: Batch) -> None:
        recipe, device = self.recipe, self.world.device
        # dropout and masks depend on seed, step and rank only, so a resumed run draws the same ones
        reseed(seed_of(recipe.seed, self.step, self.world.rank))
        set_training(self.parts, recipe)
        if self.parts.handle is not None:
            self.parts.handle.r = self.amount.at(self.step)
        if self.scheduler is not None:
            self.scheduler.step_update(self.step)
        inputs, labels = (part.to(device, non_blocking=True) for part in (batch.inputs, batch.labels))
        inputs, targets = self.parts.objective.targets(inputs, labels)
        parts = list(zip(inputs.chunk(recipe.accumulate), targets.chunk(recipe.accumulate), strict=True))
        total = torch.zeros((), device=device)
        for number, (some, wanted) in enumerate(parts):
            with self._synchronised(number == len(parts) - 1):
                with autocast(device, recipe.precision):
                    loss = self.parts.objective.loss(self.net, some, wanted) * (len(some) / len(inputs))
                # with `only_modules` and r = 0 no parameter gets a gradient
                learns = loss.requires_grad
                if learns:
                    self.scaler.scale(loss).backward()
            total += loss.detach()
        norm = self._clip() if learns else torch.zeros_like(total)
        self.window += torch.stack((total, norm, torch.ones_like(total)))
        # on a GPU a check at every step would force a synchronisation
        if device.type == "cpu":
            self._check(self.window, self.step + 1)
        if learns:
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update(self.parts.model, step=self.step)

    def _clip(self) -> Tensor:
        self.scaler.unscale_(self.optimizer)
        limit = math.inf if self.recipe.clip is None else self.recipe.clip
        norm = nn.utils.clip_grad_norm_(self.parts.model.parameters(), limit)
        whole: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        whole = whole.detach()
        # a scaled gradient may overflow: the scaler skips that step
        return torch.where(whole.isfinite(), whole, 0) if self.scaler.is_enabled() else whole

    @contextmanager
    def _synchronised(self, is_last: bool) -> Iterator[None]:
        """Synchronise gradients between processes only in the last part of an accumulated batch."""
        # with `only_modules` a forward at r = 0 has no gradient: no forward under `no_sync` may follow it
        waits = not is_last and not self.recipe.model.only_modules
        if waits and isinstance(self.net, nn.parallel.DistributedDataParallel):
            with self.net.no_sync():
                yield
        else:
            yield

    def _check(self, window: Tensor, step: int) -> None:
        """Raise `DivergedError` if a loss or gradient was not finite in any step up to `step`."""
        loss, norm, _ = window.tolist()
        # the scaler halves it at every overflow
        overflows = self.scaler.is_enabled() and self.scaler.get_scale() < _LEAST_SCALE
        if math.isfinite(loss) and math.isfinite(norm) and not overflows:
            return
        what = "gradient" if math.isfinite(loss) else "loss"
        paths = self.checkpoints.paths()
        kept = f"The last good checkpoint is {paths[0]}" if paths else "There is no checkpoint yet"
        rate = self.optimizer.param_groups[0]["lr"]
        raise DivergedError(
            f"the {what} is no number at step {step} (learning rate {rate:.3g}, r "
            f"{shown(self.amount.at(step - 1))}). {kept}. A lower optimizer.lr, a longer optimizer.warmup or a clip "
            "of the gradient helps; a changed recipe needs another --out."
        )

    def _line(self, seconds: float, images: int) -> None:
        """Write a metrics row for the steps since the last one."""
        loss, norm, count = self.world.mean(self.window).tolist()
        self.window.zero_()
        if self.log is not None:
            self.log.add(
                self.step,
                "train",
                loss=loss / count,
                gradient=norm / count,
                r=shown(self.amount.at(self.step - 1)),
                tokens=mean_tokens(self.parts.handle),
                lr=self.optimizer.param_groups[0]["lr"],
                scale=self.scaler.get_scale() if self.scaler.is_enabled() else None,
                images_per_second=images / seconds,
                peak_memory_mb=peak_mb(self.world.device),
                seconds=seconds,
            )

    def _evaluate_all(self) -> list[dict[str, Any]]:
        """Evaluate the finished model as trained, and on the test split also without merging."""
        splits, r = self.held.sources, self.parts.r
        found = [self._evaluate("valid", r)] if "valid" in splits else []
        if "test" in splits:
            merges = self.parts.handle is not None and r != 0
            found += [self._evaluate("test", amount) for amount in ([r, 0] if merges else [r])]
        return found

    def _evaluate(self, split: str, r: Any) -> dict[str, Any]:
        model = self.parts.model if self.ema is None else self.ema.module
        line = self.held.evaluate(split, model, self.parts.objective, r, self._name_unreadable)
        return line if self.log is None else self.log.add(self.step, split, **line)

    def _name_unreadable(self, batch: Batch) -> None:
        for sentence in batch.unreadable:
            if sentence not in self.unreadable:
                self.unreadable[sentence] = None
                self._say(f"left out, {len(self.unreadable)} so far: {sentence}", everyone=True)

    def _say(self, text: str, *, everyone: bool = False) -> None:
        if everyone or self.world.is_first:
            print(text, file=sys.stderr, flush=True)

    def _save(self) -> None:
        """Write a checkpoint: all processes contribute their state, the first one writes it."""
        window = self.world.total(self.window)
        self._check(window, self.step)
        model, optimizer = get_state_dict(self.parts.model, self.optimizer, options=_WHOLE)
        average = None if self.ema is None else get_model_state_dict(self.ema.module, options=_WHOLE)
        if self.log is None:
            return
        self.log.write_csv()
        content = {
            "step": self.step,
            "position": [self.position.epoch, self.position.index],
            "model": model,
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
            "ema": average,
            "window": (window / self.world.size).cpu(),
            "unreadable": list(self.unreadable),
            "recipe": self.recipe.as_dict(),
        }
        self.checkpoints.save(self.step, content)

    def _resume(self) -> None:
        """Load the last checkpoint, if there is one."""
        saved = self.checkpoints.load()
        if saved is None:
            return
        check_recipe(self.folder, from_dict(saved["recipe"]), self.recipe)
        options = StateDictOptions(full_state_dict=True)
        try:
            # a key missing from the checkpoint would silently keep its initial value
            strange = sorted(self.parts.model.state_dict().keys() ^ saved["model"].keys())
            if strange:
                raise ValueError(f"only one of them has {', '.join(strange[:3])}")
            set_state_dict(
                self.parts.model,
                self.optimizer,
                model_state_dict=saved["model"],
                optim_state_dict=saved["optimizer"],
                options=options,
            )
            if self.ema is not None:
                set_model_state_dict(self.ema.module, saved["ema"], options=options)
        except (KeyError, RuntimeError, ValueError) as error:
            raise DataError(
                f"the checkpoint {self.checkpoints.paths()[0]} is of another model, or the data has other classes than "
                f"when it was written: {' '.join(str(error).split())}. Give another folder (--out) to start anew."
            ) from error
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(saved["scaler"])
        self.window = saved["window"].to(self.world.device)
        self.unreadable = dict.fromkeys(saved["unreadable"])
        self.step, self.position = saved["step"], Position(*saved["position"])
        self._say(f"going on after step {self.step} of {self.steps}")

    def _export(self) -> None:
        model: dict[str, Any] = get_model_state_dict(
            self.parts.model if self.ema is None else self.ema.module, options=_WHOLE
        )
        prefix = "" if self.parts.core is self.parts.model else "encoder."
        state = {key.removeprefix(prefix): value for key, value in model.items() if key.startswith(prefix)}
        if self.log is not None:
            self.log.write_csv()
            export(self.folder, self.parts, self.recipe.model.name, state, self.size, self.classes, self.prepared)

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
