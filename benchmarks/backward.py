"""What each way to combine tokens of ToMe's Table 1 does in the backward, and its time; write `results/backward.*`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import torch
from tables import write
from torch import Tensor

from tokenmerge import ToMe, kernels, matching
from tokenmerge.kernels import TABLE
from tokenmerge.measure.outputs import find_device
from tokenmerge.measure.timing import Timing, environment, interleave
from tokenmerge.plan import Plan
from tokenmerge.report.progress import Progress

# choice, option, the paper's top-1 (ViT-L/16 MAE without training, r = 8), a note on its gradient
ROWS = (
    ("keep one", "keep_one", 81.01, "absorbed tokens get none"),
    ("max", "max", 83.50, "not smooth where members are equal; channel by channel one member gets it all"),
    ("average", "average", 83.57, "every member gets an equal share"),
    ("weighted", "weighted", 84.25, "every member gets a share by its size"),
)
SMALL = (2, 17, 6, 5)  # B, N, C, R for the comparison with finite differences
STEP = 1e-6
Columns = Mapping[str, Mapping[str, Any]]  # further columns by choice


def main() -> None:
    """Compare gradients, then time forward and backward of every kernel; run nothing else meanwhile."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", type=int, nargs=4, default=(32, 197, 384, 16), metavar=("B", "N", "C", "R"))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = find_device(arguments.device)
    calls = {
        (choice, kernel): _step(ToMe(combine=option), kernel, *_inputs(*arguments.shape, device))
        for choice, option, *_ in ROWS
        for kernel in _kernels(option, arguments.shape, device)
    }
    with Progress("forward and backward") as progress:
        timings = interleave(calls, device, rounds=arguments.rounds, progress=progress)
    about = {**environment(device), "rounds": str(arguments.rounds), "B, N, C, r": str(tuple(arguments.shape))}
    notes = [
        f"Relative error: the largest difference of the Jacobian in float64 from central differences (step {STEP:g}), "
        "over its largest entry. Absorbed entries: those of absorbed tokens that get a gradient.",
        "ms: forward and backward of one merge, tokens and attention's branch as in a block, float32, by kernel; - for "
        "no version but the reference.",
    ]
    write("backward", "The backward of every combination", rows(timings), about, notes)


def rows(timings: Mapping[tuple[str, str], Timing], more: Columns | None = None) -> list[dict[str, Any]]:
    """Return a row per choice; `more` adds columns, such as the accuracy after fine-tuning."""
    found = []
    for choice, option, paper, remark in ROWS:
        error, share = compare(ToMe(combine=option))
        row: dict[str, Any] = {"combine": choice, "relative error": error, "absorbed entries %": share}
        for kernel in (kernel.name for kernel in TABLE["merge"]):
            timing = timings.get((choice, kernel))
            unmeasured = None if option != "weighted" else "not measured"
            row[f"{kernel} ms"] = unmeasured if timing is None else round(timing.median * 1e3, 3)
        for kernel in (kernel.name for kernel in TABLE["merge"][:-1]):
            ours = timings.get((choice, kernel))
            row[f"reference / {kernel}"] = ours and round(timings[choice, "reference"].over(ours), 3)
        found.append({**row, "paper top-1 %": paper, **(more or {}).get(choice, {}), "gradient": remark})
    return found


def compare(method: ToMe) -> tuple[float, float]:
    """Return the largest relative error of the gradient, and the percentage of absorbed entries with a gradient."""
    plan, size, x, branch = _inputs(*SMALL, torch.device("cpu"))
    x, branch = x.detach().double(), branch.detach().double()

    def merged(tokens: Tensor) -> Tensor:
        return method.merge(plan, tokens, size, branch)[0]

    exact = torch.autograd.functional.jacobian(merged, x).flatten(3).flatten(0, 2)  # [B*M*C, B*N*C]
    columns = []
    for entry in torch.eye(x.numel(), dtype=x.dtype):
        step = STEP * entry.view_as(x)
        columns.append((merged(x + step) - merged(x - step)).flatten() / (2 * STEP))
    measured = torch.stack(columns, dim=1)
    reached = exact.abs().sum(dim=0).view_as(x).gather(1, plan.src[..., None].expand(-1, -1, x.shape[-1])) > 0
    return float((exact - measured).abs().max() / measured.abs().max()), round(100 * float(reached.float().mean()), 1)


def _inputs(B: int, N: int, C: int, R: int, device: torch.device) -> tuple[Plan, Tensor, Tensor, Tensor]:
    """Return a plan, sizes, tokens and the attention output to add to them."""
    torch.manual_seed(0)
    plan = matching.bipartite(torch.randn(B, N, 64, device=device), R, prefix=1)
    size = torch.randint(1, 9, (B, N), device=device).float()
    x, branch = (torch.randn(B, N, C, device=device, requires_grad=True) for _ in range(2))
    return plan, size, x, branch


def _kernels(option: str, shape: tuple[int, int, int, int], device: torch.device) -> list[str]:
    """Return the kernels that implement the merge of this choice on the device."""
    x = torch.empty(shape[:3], device=device)
    return [kernel.name for kernel in TABLE["merge"] if kernel.supports(x)] if option == "weighted" else ["reference"]


def _step(method: ToMe, kernel: str, plan: Plan, size: Tensor, x: Tensor, branch: Tensor) -> Callable[[], Any]:
    with torch.no_grad():
        seed = torch.randn_like(method.merge(plan, x, size, branch)[0])

    def step() -> None:
        with torch.inference_mode(False), torch.enable_grad(), kernels.force(kernel):
            torch.autograd.grad(method.merge(plan, x, size, branch)[0], (x, branch), seed)

    return step


if __name__ == "__main__":
    main()
