"""Evaluation during training: the held-out splits, and one pass over a split."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import tokenmerge
from tokenmerge.data.loader import Batch, evaluation, open_source, reseed, seed_of
from tokenmerge.data.preprocessing import Preprocessing
from tokenmerge.data.sources import Source, Stream
from tokenmerge.data.transforms import eval_transform
from tokenmerge.errors import DataError
from tokenmerge.training.distributed import World
from tokenmerge.training.log import format_r
from tokenmerge.training.objective import Objective
from tokenmerge.training.recipe import Recipe

__all__ = ["HeldOut", "mean_tokens"]


class HeldOut:
    """The validation and test splits of a recipe that exist; `notes` name the missing ones."""

    def __init__(
        self,
        recipe: Recipe,
        size: tuple[int, ...],
        classes: tuple[str, ...],
        prepared: Preprocessing | None,
        world: World,
    ) -> None:
        self.recipe, self.size, self.prepared, self.world = recipe, size, prepared, world
        self.sources, self.notes = dict[str, Source | Stream](), list[str]()
        data = recipe.data
        for split in ("valid", "test"):
            try:
                name = data.valid if data.valid and split == "valid" else data.source
                source = open_source(name, split, data)
            except DataError as error:
                if split == "valid" and (recipe.save.evaluate or data.valid):
                    raise
                self.notes.append(f"not evaluated on {split} samples: {error}")
                continue
            if source.classes != classes:
                own, others = (
                    f"{len(names)} classes ({', '.join(names[:3])}, ...)" for names in (source.classes, classes)
                )
                raise DataError(
                    f"the {split} samples of {name} have {own}, the training samples of {data.source} {others}. Give "
                    "samples of the same classes, in the same order."
                )
            self.sources[split] = source

    @torch.no_grad()
    def evaluate(
        self, split: str, model: nn.Module, objective: Objective, r: Any, see: Callable[[Batch], None]
    ) -> dict[str, Any]:
        """Evaluate a model on a split, each process on its share, at `r` if it merges; call `see` with every batch."""
        handle = tokenmerge.handle_of(model, None)
        if handle is not None:
            handle.r = r
        recipe, device, source = self.recipe, self.world.device, self.sources[split]
        # the forward of a sharded model is collective: all processes must run over the same samples
        is_sharded = recipe.parallel == "fsdp"
        rank, world = (0, 1) if is_sharded else (self.world.rank, self.world.size)
        sums = torch.zeros(len(objective.counts) + 1, device=device)
        model.eval()
        # the same random masks in every evaluation
        reseed(seed_of(recipe.seed, rank))
        start = time.perf_counter()
        for batch in evaluation(
            source,
            self.prepared or eval_transform(source.kind, self.size),
            batch_size=max(1, recipe.batch_size // recipe.accumulate // self.world.size),
            rank=rank,
            world=world,
            workers=recipe.data.workers,
        ):
            see(batch)
            if len(batch.labels):
                with self.world.autocast(recipe.precision):
                    sums[:-1] += objective.score(model, batch.inputs.to(device), batch.labels.to(device))
                sums[-1] += len(batch.labels)
        *values, count = (sums if is_sharded else self.world.total(sums)).tolist()
        seconds = time.perf_counter() - start
        found = {name: value / count for name, value in zip(objective.counts, values, strict=True)}
        about = {"r": format_r(r), "tokens": mean_tokens(handle), "images_per_second": count / seconds}
        return found | about | {"seconds": seconds}


def mean_tokens(handle: tokenmerge.Handle | None) -> float | None:
    """Return the number of tokens after a block in the last forward, averaged over blocks."""
    return None if handle is None else sum(handle.tokens) / len(handle.tokens)
