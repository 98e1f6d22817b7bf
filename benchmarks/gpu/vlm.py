"""Vision-language models on a GPU: tower, prefill and decode with fewer visual tokens, over the free bound."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import torch
from benchmarks.gpu.steps import ROOT, Job, Say

sys.path.insert(0, str(ROOT / "benchmarks"))

KEEPS, AMOUNTS, METHODS = (1.0, 0.25), (0, 16), ("divprune", "fastv")


def vlm(job: Job, say: Say, name: str, batch: int) -> None:
    """One model, with and without merging in its tower, by methods before and inside the language model."""
    if not find_spec("transformers"):
        say({"model": name, "result": "not measured: transformers is not installed"})
        return
    import vlm as script

    torch.manual_seed(0)
    model, prompts = (
        script.smolvlm(1 if job.is_tiny else 4, job.is_tiny) if name == "smolvlm" else script.llava(job.is_tiny)
    )
    model = model.to(job.device, torch.float32 if job.is_tiny else torch.bfloat16)
    rows = script.timed(
        name,
        model,
        prompts(1 if job.is_tiny else batch),
        keeps=KEEPS,
        amounts=(0, 2) if job.is_tiny else AMOUNTS,
        methods=METHODS,
        new_tokens=2 if job.is_tiny else 16,
        rounds=min(job.rounds, 5),
    )
    for row in rows:
        say(row)
