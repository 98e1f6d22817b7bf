"""Where Triton's kernels run in these tests: on CUDA where there is one, elsewhere in Triton's interpreter on CPU."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any

import pytest
import torch


def _interpret() -> None:
    """Bind the kernels to Triton's interpreter, which reads its variable when a function is decorated."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    # torch may have imported triton before, for compilation
    importlib.reload(tl.standard)
    importlib.reload(tl)
    for name in ("triton_attention", "triton_match", "triton_merge"):
        importlib.import_module(f"tokenmerge.kernels.{name}")
    create_dot = interpreter.InterpreterBuilder.create_dot

    def widened(x: Any) -> Any:
        if x.dtype != tl.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    # triton 3.9's interpreter multiplies the bit patterns of bfloat16
    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: create_dot(
        self, widened(a), widened(b), *rest
    )


if find_spec("triton") and not torch.cuda.is_available():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        _interpret()


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The device of a test's tensors."""
    if request.param == "cuda":
        return "cuda"
    if torch.cuda.is_available():
        pytest.skip("a process has either the interpreter or a GPU")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return "cpu"
