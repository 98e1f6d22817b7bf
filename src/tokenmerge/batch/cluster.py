"""The engine `ray`: Ray Data on a cluster. Tasks decode, an autoscaling pool of actors holds the model.

Back-pressure, scheduling, autoscaling and the first tries after a lost process or node are Ray's. What it gives up is
given to it once more, image by image, so that one which breaks its process costs only itself.
"""

from __future__ import annotations

import logging
import os
import pickle
import warnings
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tokenmerge.batch.decoding import Decoder, Piece, read_piece
from tokenmerge.batch.embedder import Embedder
from tokenmerge.batch.engine import Done, Engine, carried, finish
from tokenmerge.data.sources import needed
from tokenmerge.errors import DataError

__all__ = ["Cluster", "import_ray"]

# After the first, of a task that decodes and whose process or node is lost. Actors are Ray's to try again without end:
# while one restarts and loads its model, tries fail by the second, and images are not to blame.
_TRIES = 2
_BLOCKS = 10_000  # tasks, at most, that the pieces are cut into
_LOST = f"decoding it ended {_TRIES + 1} processes of Ray, or raised an error: see Ray's log"


class Cluster(Engine):
    """Ray Data on the cluster that `ray` is connected to or RAY_ADDRESS names, else on this machine.

    Args:
        embedder: the model; every actor makes its own, which must be the same. On a cluster with GPUs each has one,
            unless the embedder was made for the CPU by name.
        decoder: how images are decoded.
        workers: tasks that decode at once, at most; None: as many as Ray finds room for.
        models: actors, at most; None: one for each GPU that Ray finds room for, without GPUs one for two CPUs.

    Raises `UnsupportedError` with the install command without Ray, and `DataError` where no actor can make the model,
    where it has other weights than here, and where nothing comes back at all.
    """

    name = "ray"

    def __init__(self, embedder: Embedder, decoder: Decoder, workers: int | None, models: int | None) -> None:
        self._ray = import_ray()
        self._embedder, self._decoder = embedder, decoder
        self._most_tasks, self._most_actors = workers, models
        self._seen: set[str] = set()

    def run(self, pieces: Iterator[Piece], count: int) -> Generator[Done, None, None]:
        """Yield every piece as it is done, those that were given up at the end, image by image."""
        with _connected(self._ray):
            there = self._ray.cluster_resources()
            has_gpu = there.get("GPU", 0) > 0 and not self._embedder.is_for_cpu
            make = self._ray.put((self._embedder.maker(), self._embedder.settings(), str(Path.cwd())))
            self._cpus = max(1, int(there.get("CPU", 1)))
            if self._most_actors is None and not has_gpu:
                self._most_actors = max(1, self._cpus // 2)
            # no CPU: actors on a cluster that loses nodes would leave none to decode for them, and wait for ever
            self._actors = {"fn_constructor_args": (make,), "num_cpus": 0, "num_gpus": 1 if has_gpu else None}
            left = {piece.images[0]: _absolute(piece) for piece in pieces}
            yield from self._pass(left)
            left = {image: one for piece in left.values() for image, one in _singly(piece)}
            yield from self._pass(left)
        if left and not self._seen:
            raise DataError("Ray gave up every image, and none was embedded: see its log. Nothing was written of them.")
        for image in left:
            yield Done([image], torch.empty(0, 1), [(0, 0)], [_LOST])

    def _pass(self, left: dict[int, Piece]) -> Generator[Done, None, None]:
        """Yield what Ray makes of pieces, and take them out of `left`; what it gives up stays there."""
        while left:
            before = len(left)
            try:
                for row in self._dataset([*left.values()]).iter_rows():
                    found = pickle.loads(row["done"])
                    if isinstance(found, Exception):
                        raise found
                    if left.pop(found.images[0], None) is not None:
                        self._count(found.who)
                        yield found
                return
            except self._ray.exceptions.RayError as error:  # of the job as a whole
                if len(left) == before:
                    raise DataError(f"Ray ended the job: {_reason(error)}") from error

    def _count(self, who: str) -> None:
        self._seen.add(who)
        self.models = len(self._seen)
        self.workers = min(self._cpus, self._most_tasks or self._cpus)

    def _dataset(self, pieces: list[Piece]) -> Any:
        data = self._ray.data
        rows = [{"piece": pickle.dumps(piece)} for piece in pieces]
        made = data.from_items(rows, override_num_blocks=min(len(rows), _BLOCKS))
        with warnings.catch_warnings():
            # how often Ray tries has no other name yet: without, an image that ends its process is tried for ever
            warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
            made = self._mapped(made)
        made.context.enable_progress_bars = made.context.print_on_execution_start = False
        made.context.max_errored_blocks = -1  # they are missed in the end
        return made

    def _mapped(self, made: Any) -> Any:
        data = self._ray.data
        # other arguments than those of the actors, or Ray would decode there, too
        tasks = data.TaskPoolStrategy(size=self._most_tasks)
        made = made.map(_read, fn_kwargs={"decoder": self._decoder}, compute=tasks, max_retries=_TRIES)
        pool = data.ActorPoolStrategy(min_size=1, max_size=self._most_actors)
        return made.map(_Model, compute=pool, **self._actors)


def _read(row: Mapping[str, Any], decoder: Decoder) -> dict[str, Any]:
    """Fetch, decode and prepare the images of a piece: a task."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # the limit is the decoder's
    torch.set_num_threads(1)
    piece = pickle.loads(row["piece"])
    read = read_piece(decoder, piece, torch.empty(0), torch.zeros(1, dtype=torch.int64), 0)
    return {"read": pickle.dumps((piece, read))}


class _Model:
    """An actor: the model, made anew where it is."""

    def __init__(self, made_of: Any) -> None:
        import ray

        make, expected, folder = ray.get(made_of)
        with suppress(OSError):
            os.chdir(folder)  # names of models and configurations may be paths of the caller's
        self.embedder: Embedder = make()
        found = self.embedder.settings()
        differs = [
            f"{name}: {found[name]} there, {expected[name]} here" for name in found if found[name] != expected[name]
        ]
        if differs:
            raise DataError(f"the model that a node of the cluster made is another one: {'; '.join(differs)}.")
        self.who = f"{ray.get_runtime_context().get_node_id()} {os.getpid()}"

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        piece, read = pickle.loads(row["read"])
        found: Done | Exception
        try:
            found = finish(self.embedder, piece, read, read.tensors(torch.empty(0)), self.who)
        except Exception as error:  # of the model: it ends the job, and is raised there
            found = carried(error)
        return {"done": pickle.dumps(found)}


def import_ray() -> Any:
    """Return the module ray; raise `UnsupportedError` with the install command if it is missing."""
    with needed("--engine ray", "ray"):
        import ray
        import ray.data
    return ray


@contextmanager
def _connected(ray: Any) -> Iterator[None]:
    """Connect to the cluster of RAY_ADDRESS, else start Ray on this machine, if that was not done before."""
    if ray.is_initialized():
        yield
        return
    ray.init(logging_level=logging.WARNING, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


def _absolute(piece: Piece) -> Piece:
    """Return a piece with paths that do not depend on the folder of a process."""
    places = [one if "://" in one.path else replace(one, path=str(Path(one.path).absolute())) for one in piece.places]
    return replace(piece, places=places)


def _singly(piece: Piece) -> Iterator[tuple[int, Piece]]:
    for image, place in zip(piece.images, piece.places, strict=True):
        yield image, Piece(piece.number, [image], [place])


def _reason(error: Exception) -> str:
    """Return the last line of what an error of Ray says, which is that of its cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
