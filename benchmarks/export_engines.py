"""Time exported models in onnxruntime and OpenVINO on this machine's CPU; write `results/export_engines.{csv,md}`.

Merged, unmerged and the free bound are exported in the same way and, engine by engine, run in turn in one process.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch

from tokenmerge.measure.timing import Timing, environment, interleave
from tokenmerge.report.progress import Progress
from tokenmerge.report.table import save_rows, show
from tokenmerge.tools.export import TARGETS, export

RESULTS = Path(__file__).parent / "results"
MODEL, BATCH, R, BAR = "vit_small_patch16_224", 8, 13, 1.08
# method and r of each exported variant
VARIANTS = {"merged": ("tome", R), "unmerged": ("tome", 0), "bound": ("drop", R)}
FORMATS = ("onnx", "openvino")


def main() -> None:
    """Time on `--threads` threads in float32; run nothing else meanwhile."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--matmul", action="store_true", help="the merge without scatter; only shown, not written")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = timm.create_model(MODEL).eval()
    x = torch.randn(BATCH, 3, 224, 224)
    calls: dict[str, Callable[[], Any]] = {}
    differences = {}
    with TemporaryDirectory() as folder:
        for to in FORMATS:
            for name, (method, r) in VARIANTS.items():
                path = Path(folder) / f"{name}{TARGETS[to].suffix}"
                is_matmul = arguments.matmul and name == "merged"
                differences[f"{to} {name}"] = export(
                    model, path, r=r, to=to, method=method, matmul=is_matmul
                ).difference
                calls[f"{to} {name}"] = _call(TARGETS[to].load(path), x)
        timings: dict[str, Timing] = {}
        # one engine at a time, because its threads spin for a while after a run
        for to in FORMATS:
            own = {name: call for name, call in calls.items() if name.startswith(to)}
            with Progress(to) as progress:
                timings.update(interleave(own, x.device, rounds=arguments.rounds, progress=progress))
    rows = [_row(to, timings, differences) for to in FORMATS]
    engines = {TARGETS[to].engine: version(TARGETS[to].engine) for to in FORMATS}
    about = {**environment(x.device), **engines, "dtype": "float32", "rounds": str(arguments.rounds)}
    notes = ["`over bound` is the median over rounds of merged time / free-bound time; `bar` the most it should be."]
    if not arguments.matmul:
        for suffix in (".csv", ".md"):
            save_rows(RESULTS / f"export_engines{suffix}", rows, about, notes)
    show(rows, "Exported models on CPU, medians of interleaved rounds")


def _row(to: str, timings: dict[str, Timing], differences: dict[str, float]) -> dict[str, Any]:
    merged, unmerged, bound = (timings[f"{to} {name}"] for name in VARIANTS)
    return {
        "engine": TARGETS[to].engine,
        "model": MODEL,
        "r": R,
        "batch": BATCH,
        "ms": round(merged.median * 1e3, 3),
        "spread %": None if merged.spread is None else round(merged.spread * 100, 1),
        "unmerged ms": round(unmerged.median * 1e3, 3),
        "speed-up": round(unmerged.over(merged), 3),
        "bound ms": round(bound.median * 1e3, 3),
        "over bound": round(merged.over(bound), 3),
        "bar": BAR,
        "difference from eager": f"{differences[f'{to} merged']:.1e}",
    }


def _call(run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> Callable[[], Any]:
    return lambda: run(x)


if __name__ == "__main__":
    main()
