"""Time merging over the free bound on this machine's CPU and write `results/cpu_overhead.{csv,md}`."""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch

from tokenmerge.tools.bench import Bench, bench
from tokenmerge.tools.results import Progress, save_rows, show

RESULTS = Path(__file__).parent / "results"
# model, batch, r, and the most it may take over the free bound
CASES = (("vit_base_patch16_224", 8, 16, 1.05), ("vit_small_patch16_224", 16, 13, 1.10))


def main() -> None:
    """Run every case in float32, eager, on `--threads` threads; nothing else should run meanwhile."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results: list[Bench] = []
    for name, batch, r, bound in CASES:
        model = timm.create_model(name).eval()
        with Progress(name) as progress:
            found = bench(model, rs=[r], batches=[batch], rounds=arguments.rounds, label=name, progress=progress)
        found.rows[0]["bar"] = bound
        results.append(found)
    rows = [row for found in results for row in found.rows]
    notes = ["`over bound` is the median over rounds of merged time / free-bound time; `bar` the most it should be."]
    for suffix in (".csv", ".md"):
        save_rows(RESULTS / f"cpu_overhead{suffix}", rows, results[0].environment, notes)
    show(rows, "CPU, medians of interleaved rounds")


if __name__ == "__main__":
    main()
