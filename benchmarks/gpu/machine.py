"""What the figures were measured on, as read: nothing is set."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version

import torch
from benchmarks.gpu.steps import ROOT, Job, Row, Say
from benchmarks.worker import describe

import tokenmerge
from tokenmerge.measure import timing

SMI = ("driver_version", "pstate", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit")
SMI = (*SMI, "temperature.gpu", "memory.used", "memory.total")


def environment(job: Job, say: Say) -> None:
    """One row: what is needed to judge the others, as read; nothing is set."""
    device = torch.device(job.device)
    found: Row = {"device": timing.environment(device)["device"] if _is_there(device) else "none"}
    if found["device"] != "none" and device.type == "cuda":
        seen = torch.cuda.get_device_properties(device)
        found["capability"] = f"{seen.major}.{seen.minor}"
        found["memory GiB"] = round(seen.total_memory / 2**30, 1)
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    found |= {"system": f"{platform.system()} {platform.machine()}", "cores": os.cpu_count()}
    found |= {"python": platform.python_version(), "cuda": torch.version.cuda or "none"}
    found["cudnn"] = str(torch.backends.cudnn.version() or "none")
    for name in ("triton", "timm", "transformers", "torchvision", "pytest"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    found["torch"] = torch.__version__
    found |= {"tokenmerge": tokenmerge.__version__, "commit": describe(ROOT), **power()}
    say(found)


def _is_there(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.device_count() > (device.index or 0)


def power() -> dict[str, str]:
    """Read clocks, power and driver where there is nvidia-smi."""
    command = ["nvidia-smi", f"--query-gpu={','.join(SMI)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        return dict(zip(SMI, done.stdout.splitlines()[0].split(", "), strict=True))
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return dict.fromkeys(SMI, "not read")
