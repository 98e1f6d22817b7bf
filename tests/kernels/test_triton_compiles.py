"""Every Triton kernel compiles for real chips, on a machine that has none of them.

The file runs itself in a process of its own, where Triton is bound to its compiler and not to its interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

PTXAS = Path(find_spec("triton").origin).parent / "backends" / "nvidia" / "bin" / "ptxas"
SHARED = 99 * 1024  # bytes a program may have on compute capability 8.6 and 8.9; others have more


@pytest.mark.slow
@pytest.mark.skipif(not PTXAS.exists(), reason="this Triton brings no ptxas")
@pytest.mark.parametrize(("chip", "calls"), [(80, "float32-64,bfloat16-80"), (90, "bfloat16-64,float32-80")])
def test_every_kernel_compiles(chip: int, calls: str, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, __file__, str(chip), calls],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    *compiled, known = [json.loads(line) for line in run.stdout.splitlines()]
    assert {kernel["name"] for kernel in compiled} == set(known)
    for kernel in compiled:
        assert kernel["target"] == chip
        assert f".target sm_{chip}" in kernel["ptx"] and kernel["cubin"] > 0, kernel
        assert kernel["shared"] <= SHARED, kernel


def main(chip: int, calls: str) -> None:
    """Compile what the public functions would launch and print a line about each kernel, then all their names."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from tokenmerge.kernels import triton_attention, triton_match, triton_merge

    class Chip:
        """A driver that can say what it drives and nothing more."""

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", chip, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    def compile_only(kernel: JITFunction, grid: Any) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            built = kernel.run(*args, grid=grid, warmup=True, **options)
            ptx = "\n".join(line for line in built.asm["ptx"].splitlines() if line.startswith(".target"))
            about = {"name": kernel.__name__, "target": built.metadata.target.arch, "shared": built.metadata.shared}
            print(json.dumps({**about, "ptx": ptx, "cubin": len(built.asm["cubin"])}))

        return launch

    driver.set_active(Chip())
    JITFunction.__getitem__ = compile_only
    keep, src, dst = (torch.zeros(1, count, dtype=torch.int64) for count in (181, 16, 16))
    for call in calls.split(","):
        kind, _, width = call.partition("-")
        q, k, v = torch.zeros(3, 1, 2, 197, int(width), dtype=getattr(torch, kind)).requires_grad_().unbind(0)
        triton_match.bipartite(k, 16, 1)
        x = torch.zeros(1, 197, 768, dtype=q.dtype, requires_grad=True)
        triton_merge.merge(x, torch.ones(1, 197), keep, src, dst, x)[0].sum().backward()
        triton_attention.attend(q, k, v, torch.zeros(1, 197)).sum().backward()
    triton_match.bipartite(torch.zeros(1, 3, 1040, 64), 16, 1)
    modules = (triton_attention, triton_match, triton_merge)
    print(json.dumps([name for module in modules for name in vars(module) if name.endswith("_kernel")]))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
