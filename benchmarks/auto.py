"""What "auto" chooses and what that is worth, on three models: write `results/auto.md` and its candidates."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tables import write
from torch import Tensor, nn

import tokenmerge
from tokenmerge import assets
from tokenmerge.data.labelled import normalise
from tokenmerge.measure.outputs import shared_copy
from tokenmerge.measure.timing import environment, interleave

HERE = Path(__file__).parent
SIZE = (1, 28, 28)
SHARES = (0.75, 0.5, 0.35)
BATCH = 50


def load(name: str) -> nn.Module:
    """Return the bundled model, or one of `benchmarks/models`."""
    if name == "reference":
        return assets.reference_model()
    folder = HERE / "models" / name
    model = assets._build_model(json.loads((folder / "reference_vit.json").read_text()))
    model.load_state_dict(load_file(folder / "reference_vit.safetensors"))
    return model.eval()


def main() -> None:
    """Choose on training images, evaluate on test images."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=64, help="unlabelled training images to choose on (%(default)s)")
    parser.add_argument("--limit", type=int, help="use only the first LIMIT test images")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds (%(default)s)")
    arguments = parser.parse_args()
    chosen_on = normalise(assets.fashion_mnist("train")[0][: arguments.images])
    images, labels = (part[: arguments.limit] for part in assets.fashion_mnist("test"))
    rows, candidates = [], []
    for name in ("reference", "pooled", "registers"):
        model = load(name)
        unmerged = answers(model, images)
        for share in SHARES:
            row, tried = compare(model, share, chosen_on, images, labels, unmerged, arguments.rounds)
            rows.append({"model": name, **row})
            candidates += [{"model": name, "MACs asked": share, **candidate} for candidate in tried]
            print(rows[-1], flush=True)
    about = environment(torch.device("cpu"))
    notes = f"Chosen on {arguments.images} training images, measured on {len(images)} test images; batch {BATCH}."
    write("auto", "What auto chooses, beside tome with a constant r of the same MACs", rows, about, [notes])
    write("auto-candidates", "Every candidate of auto, on the images it chooses by", candidates, about, [notes])


def compare(
    model: nn.Module, share: float, chosen_on: Tensor, images: Tensor, labels: Tensor, unmerged: Tensor, rounds: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return one row for a share of the MACs, and the candidates tried for it."""
    full = tokenmerge.flops(model, SIZE)
    tome, auto = shared_copy(model), shared_copy(model)
    handle = tokenmerge.patch(tome, r=0)
    r = 0
    while tokenmerge.flops(tome, SIZE) > share * full:
        r += 1
        handle.r = r
    found = tokenmerge.patch(auto, "auto", r=r, calibrate=chosen_on).calibration
    assert found is not None
    logits = {"tome": answers(tome, images), "auto": answers(auto, images)}
    x = normalise(images[:BATCH])
    times = interleave({"tome": lambda: tome(x), "auto": lambda: auto(x)}, torch.device("cpu"), rounds=rounds)
    damage = {key: divergence(value, unmerged) for key, value in logits.items()}
    hits = {key: (value.argmax(1) == labels).float().mean().item() for key, value in logits.items()}
    differ = ((logits["tome"].argmax(1) == labels) != (logits["auto"].argmax(1) == labels)).sum().item()
    row = {
        "MACs asked": share,
        "MACs tome": round(tokenmerge.flops(tome, SIZE) / full, 4),
        "MACs auto": round(tokenmerge.flops(auto, SIZE) / full, 4),
        "r of tome": r,
        "chosen": f"{found.best.method!r}, {found.best.shape}",
        "KL tome": damage["tome"],
        "KL auto": damage["auto"],
        "auto / tome": round(damage["auto"] / damage["tome"], 3),
        "top-1 % unmerged": round(100 * (unmerged.argmax(1) == labels).float().mean().item(), 2),
        "top-1 % tome": round(100 * hits["tome"], 2),
        "top-1 % auto": round(100 * hits["auto"], 2),
        "standard error": round(100 * differ**0.5 / len(labels), 2),
        "time auto / tome": round(times["auto"].over(times["tome"]), 3),
    }
    tried = [
        {"shape": c.shape, "method": repr(c.method), "MACs": round(c.macs / full, 4), "change": f"{c.damage:.2e}"}
        for c in found.tried
    ]
    return {key: f"{v:.2e}" if key.startswith("KL") else v for key, v in row.items()}, tried


@torch.inference_mode()
def answers(model: nn.Module, images: Tensor) -> Tensor:
    """Return the logits of all images."""
    return torch.cat([model(normalise(batch)) for batch in images.split(BATCH)])


def divergence(logits: Tensor, unmerged: Tensor) -> float:
    """Return the mean KL divergence from the unmerged model's answers."""
    wanted = unmerged.log_softmax(1)
    return nn.functional.kl_div(logits.log_softmax(1), wanted, log_target=True, reduction="batchmean").item()


if __name__ == "__main__":
    main()
