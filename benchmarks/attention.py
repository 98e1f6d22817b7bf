"""Time every exact way of proportional attention beside attention without a bias, all in one interleaved run."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from tokenmerge.kernels import TABLE
from tokenmerge.measure.outputs import find_device
from tokenmerge.measure.timing import environment, interleave
from tokenmerge.report.progress import Progress
from tokenmerge.report.table import save_rows, show

RESULTS = Path(__file__).parent / "results"
# B, H, N, D
SHAPES = ((8, 12, 197, 64), (16, 6, 144, 64), (32, 3, 144, 64), (2, 16, 577, 64), (1, 16, 1025, 80), (1, 4, 4097, 64))


def main() -> None:
    """Time every shape in float32 and bfloat16; run nothing else meanwhile."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=1, help="times the batch of every shape")
    parser.add_argument("--out", type=Path, default=RESULTS / "attention.md")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = find_device(arguments.device)
    rows = []
    for dtype in arguments.dtype:
        for B, H, N, D in SHAPES:
            B *= arguments.batch
            q, k, v = torch.randn(B, N, 3, H, D, device=device, dtype=getattr(torch, dtype)).permute(2, 0, 3, 1, 4)
            bias = torch.randint(1, 9, (B, N), device=device).float().log()
            calls = {"no bias": partial(F.scaled_dot_product_attention, q, k, v)}
            for kernel in TABLE["attend"]:
                if kernel.supports(q):
                    calls[kernel.name] = partial(kernel.run, q, k, v, bias)
            with Progress(f"{dtype} {(B, H, N, D)}") as progress:
                timings = interleave(calls, device, rounds=arguments.rounds, progress=progress)
            over = {
                name: round(timings[name].over(timings["no bias"]), 3) if name in timings else "not measured"
                for name in (kernel.name for kernel in TABLE["attend"])
            }
            shape = {"dtype": dtype, "batch": B, "heads": H, "tokens": N, "width": D}
            rows.append({**shape, "no bias ms": round(timings["no bias"].median * 1e3, 3), **over})
    notes = ["Columns by name: time over attention without a bias, the median over rounds."]
    about = {**environment(device), "rounds": str(arguments.rounds)}
    for suffix in (".csv", ".md"):
        save_rows(arguments.out.with_suffix(suffix), rows, about, notes)
    show(rows, "Proportional attention, time over attention without a bias")


if __name__ == "__main__":
    main()
