"""The bundled model on the bundled images at several r: tables, a plot, pictures of the groups, and two pages."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tokenmerge
from tokenmerge.assets import CLASSES
from tokenmerge.data.labelled import FashionMNIST, normalise
from tokenmerge.errors import DataError
from tokenmerge.files import replacing, write_file
from tokenmerge.report.plots import plot_tradeoff, require_viz
from tokenmerge.report.table import PICTURES, as_latex, as_markdown, check_writable, measured_on
from tokenmerge.schedule import R
from tokenmerge.tools.evaluate import Evaluation, evaluate
from tokenmerge.tools.explore import explore
from tokenmerge.tools.models import load_model
from tokenmerge.tools.visualize import draw_groups, sheet

__all__ = ["EXPLORER", "REPORT", "demo"]

RS: tuple[R, ...] = (0, 4, 8, 12, 16)
REPORT, EXPLORER = "report.html", "explore.html"
SCALE = 6  # a 28 x 28 image is drawn 168 pixels wide


def demo(
    folder: str | Path = "tokenmerge-demo",
    *,
    rs: Sequence[R] = RS,
    limit: int | None = None,
    batch_size: int = 32,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Evaluate the bundled model and write `table.md`, `.json`, `.tex`, `plot.png`, `.svg`, `.pdf` and `merged.png`.

    `report.html` is the page of the figures, `explore.html` that of what merged, where anything is to merge. Raises
    before any work: `DataError` if the folder cannot be written, `UnsupportedError` without matplotlib.
    """
    folder = Path(folder)
    require_viz()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot write to {folder}: {error.strerror}.") from error
    check_writable(folder / "table.md")
    model = load_model("reference")
    data = FashionMNIST(batch_size, limit)
    result = evaluate(model, data, rs=rs, device=device, bound=True, progress=progress)
    title = f"Bundled ViT on {result.images} Fashion-MNIST test images, batch {batch_size}, fp32, eager"
    notes = "\n\n".join(result.notes)
    text = f"# {title}\n\n{as_markdown(result.rows)}\n\n{notes}\n\n{measured_on(result.environment)}.\n"
    write_file(folder / "table.md", text)
    content = {"title": title, "environment": result.environment, "images": result.images, "rows": result.rows}
    content["notes"] = result.notes
    write_file(folder / "table.json", json.dumps(content, indent=2) + "\n")
    write_file(folder / "table.tex", as_latex(result.rows))
    plot_tradeoff([folder / f"plot{kind}" for kind in PICTURES], result.rows, title)
    with replacing(folder / "merged.png") as part:
        pictures(model.cpu(), data, [r for r in rs if r != 0]).save(part)
    write_file(folder / REPORT, result.page(title))
    _explore(model, data, [r for r in rs if r != 0], folder / EXPLORER, device)
    return result


def _explore(model: nn.Module, data: FashionMNIST, rs: Sequence[R], path: Path, device: str) -> None:
    """Write the explorer of one image of each of six classes; without an `r` there is nothing to explore."""
    if not rs:
        path.unlink(missing_ok=True)  # of an earlier demo
        return
    images = [_as_image(data.images[i], 1) for i in _chosen(data)]
    for i, image in zip(_chosen(data), images, strict=True):
        image.filename = CLASSES[data.labels[i]].replace("/", " or ")  # what the page calls it
    explore(model, images, path, rs=rs, device=device, label="the bundled ViT", force=True)


def pictures(model: nn.Module, data: FashionMNIST, rs: Sequence[R]) -> Any:
    """Return a PIL page: one image of each of six classes, and its groups at each `r`."""
    chosen = _chosen(data)
    x = normalise(data.images[chosen])
    rows: list[list[Any]] = [[_as_image(data.images[i])] for i in chosen]
    labels = ["image"]
    for r in rs:
        with tokenmerge.patched(model, r=r, track=True) as handle, torch.inference_mode():
            model(x)
            labels.append(f"r = {r}: {handle.tokens[-1]} tokens")
            groups, grid = handle.groups[-1][:, handle.prefix :], handle.grid
        for row, group in zip(rows, groups, strict=True):
            row.append(draw_groups(row[0], group, patch_size=2 * SCALE, grid=grid))
    return sheet(rows, labels)


def _chosen(data: FashionMNIST) -> list[int]:
    return [int((data.labels == label).nonzero()[0]) for label in data.labels.unique()[:6]]


def _as_image(image: Tensor, scale: int = SCALE) -> Any:  # uint8 [28, 28]
    from PIL import Image

    side = image.shape[0]
    grey = Image.frombytes("L", (side, side), bytes(image.flatten().tolist()))
    return grey.convert("RGB").resize((side * scale, side * scale), Image.NEAREST)
