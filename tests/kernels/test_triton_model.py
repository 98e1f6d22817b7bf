"""A whole model on the Triton kernels: forward, gradients, and captured."""

from __future__ import annotations

import torch

import tokenmerge
from helpers import assert_close, tiny_vit
from tokenmerge import kernels


def test_a_model_runs_on_triton_alone(device: str) -> None:
    model = tiny_vit(init_values=0.5).to(device)
    x = torch.randn(2, 3, 32, 32, device=device)
    handle = tokenmerge.patch(model, r=8)
    found = []
    for name in ("reference", "triton"):
        with kernels.force(name):
            model.zero_grad()
            out = model(x)
            out.square().sum().backward()
            found.append([out, *(parameter.grad.clone() for parameter in model.parameters())])
            assert handle.report().kernels == dict.fromkeys(("bipartite", "merge", "attend"), name)
    for expected, got in zip(*found, strict=True):
        assert_close(got, expected, 1e-4)
    with kernels.force("triton"), torch.no_grad():
        assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), found[0][0], 1e-4)
